<#
.SYNOPSIS
Installs metquay-proxy on Windows, or a newer version of it, and lets Task Scheduler run it.

.DESCRIPTION
For the whole machine, as administrator: it runs from the machine's start as LOCAL SERVICE, an account with few rights. The
keys lie in two files that only that account, SYSTEM and administrators can read.

With -ForMe, for yourself: it runs while you are signed in, and the keys lie in your Credential Manager.

Run it again to change a key or to install a newer version.

Needs Python 3.11 or newer (for the whole machine one that was installed for all users) and Windows PowerShell 5.1 or newer.
More settings go into settings\.env in the folder that it names at the end; then restart the task. There is no Windows where
this project is tested: these scripts were read, and parsed by a test, but not run.

.EXAMPLE
powershell -ExecutionPolicy Bypass -File install.ps1 -MetquayHost lab.metquay.co
#>
[CmdletBinding()]
param(
    # Your Metquay server.
    [Parameter(Mandatory)] [string] $MetquayHost,
    # For the signed-in user rather than for the machine.
    [switch] $ForMe,
    # What pip installs: a wheel, or a folder with the source, such as this repository's.
    [string] $Package = "$PSScriptRoot\..\..",
    # The Python to use: the launcher's default, or the path of a python.exe.
    [string] $Python = 'py'
)
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

function Invoke-Program {
    # A program that fails is no error to PowerShell by itself.
    $program = $args[0]
    $arguments = @($args | Select-Object -Skip 1)
    & $program @arguments
    if ($LASTEXITCODE -ne 0) { throw "$program ended with exit code $LASTEXITCODE" }
}

$task = 'metquay-proxy'
$user = [Security.Principal.WindowsIdentity]::GetCurrent()
$administrators = [Security.Principal.WindowsBuiltInRole]::Administrator
if (-not $ForMe -and -not ([Security.Principal.WindowsPrincipal] $user).IsInRole($administrators)) {
    throw 'Run this in a PowerShell that was started as administrator, or with -ForMe for yourself alone.'
}
$pythonHome = Invoke-Program $Python -c 'import sys; assert sys.version_info >= (3, 11); print(sys.base_prefix)'
if (-not $ForMe -and $pythonHome -match '\\(Users|WindowsApps)\\') {
    throw "LOCAL SERVICE cannot run $pythonHome. Install Python for all users, and name its python.exe with -Python."
}

# In Program Files only an administrator can write: nobody else can have laid a program or a folder there before.
$folder = if ($ForMe) { "$env:LOCALAPPDATA\metquay-proxy" } else { "$env:ProgramFiles\metquay-proxy" }
$settings = "$folder\settings"
$logs = "$folder\logs"
$programs = "$folder\venv\Scripts"

# An older installation: requests in flight are lost.
Get-ScheduledTask -TaskName $task -ErrorAction SilentlyContinue | Stop-ScheduledTask
Get-Process | Where-Object { $_.Path -like "$folder\*" } | Stop-Process -Force -PassThru | Wait-Process

New-Item -ItemType Directory -Force -Path $folder, $settings, $logs | Out-Null
Invoke-Program $Python -m venv "$folder\venv"
$wanted = if ($ForMe) { "${Package}[keyring]" } else { $Package }
Invoke-Program "$programs\python.exe" -m pip install --quiet --upgrade $wanted
Copy-Item -Path "$PSScriptRoot\run.ps1" -Destination $folder -Force
if (-not $ForMe) {
    # SYSTEM, Administrators and LOCAL SERVICE by their numbers, since names are translated. Before any key is written.
    $full = '*S-1-5-18:(OI)(CI)F', '*S-1-5-32-544:(OI)(CI)F'
    Invoke-Program icacls.exe $settings /inheritance:r /grant:r $full[0] $full[1] '*S-1-5-19:(OI)(CI)RX'
    Invoke-Program icacls.exe $logs /inheritance:r /grant:r $full[0] $full[1] '*S-1-5-19:(OI)(CI)M'
}

foreach ($name in 'METQUAY_ACCESS_KEY', 'METQUAY_SECRET_KEY') {
    $secret = Read-Host -AsSecureString -Prompt "Paste $name (nothing keeps the one that is there)"
    $key = [Net.NetworkCredential]::new('', $secret).Password
    if (-not $key) { continue }
    if ($ForMe) {
        # By its standard input: a command line can be read by other programs.
        $key | & "$programs\keyring.exe" set metquay-proxy $name
        if ($LASTEXITCODE -ne 0) { throw "Credential Manager did not take $name" }
    }
    else {
        [IO.File]::WriteAllText("$settings\$name", $key)
    }
}
if (Test-Path -LiteralPath "$settings\.env") {
    Write-Warning "$settings\.env was there and is kept: see that METQUAY_HOST is right in it."
}
else {
    $lines = @("METQUAY_HOST=$MetquayHost", '# info: one line for each request', 'METQUAY_LOG_LEVEL=warning')
    if (-not $ForMe) {
        $lines += "METQUAY_ACCESS_KEY_FILE=$settings\METQUAY_ACCESS_KEY"
        $lines += "METQUAY_SECRET_KEY_FILE=$settings\METQUAY_SECRET_KEY"
    }
    [IO.File]::WriteAllLines("$settings\.env", [string[]] $lines)
}

$powershell = "$env:SystemRoot\System32\WindowsPowerShell\v1.0\powershell.exe"
$arguments = "-NoProfile -NonInteractive -WindowStyle Hidden -ExecutionPolicy Bypass -File `"$folder\run.ps1`""
$action = New-ScheduledTaskAction -Execute $powershell -Argument $arguments
if ($ForMe) {
    $trigger = New-ScheduledTaskTrigger -AtLogOn -User $user.Name
    $principal = New-ScheduledTaskPrincipal -UserId $user.Name -LogonType Interactive
}
else {
    $trigger = New-ScheduledTaskTrigger -AtStartup
    $principal = New-ScheduledTaskPrincipal -UserId 'LOCALSERVICE' -LogonType ServiceAccount
}
# By default a task is ended after three days, and on a laptop that runs on its battery.
$conditions = New-ScheduledTaskSettingsSet -ExecutionTimeLimit ([TimeSpan]::Zero) -MultipleInstances IgnoreNew `
    -StartWhenAvailable -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries
Register-ScheduledTask -TaskName $task -Description 'Authenticating proxy for the Metquay API' -Action $action `
    -Trigger $trigger -Principal $principal -Settings $conditions -Force | Out-Null
Start-ScheduledTask -TaskName $task

Push-Location -LiteralPath $settings # where .env is
& "$programs\metquay-proxy.exe" health --ready --wait 30
Pop-Location
if ($LASTEXITCODE -eq 0) { Write-Output "Ready at http://localhost:6387. Settings: $settings\.env" }
else { Write-Warning "Not ready yet. Settings: $settings\.env; what the proxy says: $logs\proxy.log" }
