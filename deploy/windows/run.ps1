# Runs the proxy until it is told to stop; started by the task that install.ps1 makes, in the folder that it makes. Restarts
# a proxy that failed, but not one with wrong settings (exit code 2). Read and parsed, but not run, by the project.
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

$programs = "$PSScriptRoot\venv\Scripts"
$settings = "$PSScriptRoot\settings"
$logs = "$PSScriptRoot\logs"

foreach ($name in 'METQUAY_ACCESS_KEY', 'METQUAY_SECRET_KEY') {
    if (Test-Path -LiteralPath "$settings\$name") { continue } # named in .env
    $key = & "$programs\keyring.exe" get metquay-proxy $name
    if ($LASTEXITCODE -ne 0) { throw "Credential Manager holds no $name of metquay-proxy" }
    # For this process, and so for the proxy, which is its child.
    [Environment]::SetEnvironmentVariable($name, $key, 'Process')
}

do {
    if (Test-Path -LiteralPath "$logs\proxy.log") {
        Move-Item -LiteralPath "$logs\proxy.log" -Destination "$logs\previous.log" -Force
    }
    # In the settings' folder, where the proxy looks for .env.
    $proxy = Start-Process -FilePath "$programs\metquay-proxy.exe" -ArgumentList 'serve' -WorkingDirectory $settings `
        -RedirectStandardError "$logs\proxy.log" -RedirectStandardOutput "$logs\start.log" -NoNewWindow -Wait -PassThru
    $failed = $proxy.ExitCode -notin 0, 2
    if ($failed) { Start-Sleep -Seconds 5 }
} while ($failed)
exit $proxy.ExitCode
