<#
.SYNOPSIS
Installs or updates metquay-proxy, which needs no Python, and makes Task Scheduler run it.

.DESCRIPTION
With -ForMe, for yourself: it runs while you are signed in, and the keys are stored in your Credential Manager.

Without it, for the whole computer, as administrator: it runs from the computer's start as LOCAL SERVICE, an account with few
rights. The keys are in two files that only administrators, and services that run as LOCAL SERVICE, can read.

To change a key or to install a newer version, run it again from the folder where you unpacked the archive. Requests that are
under way at that moment are lost.

Program, .env and logs\proxy.log are in one folder, which it names at the end. More settings go into .env; stop and start the
task then. Whatever ends the proxy, Task Scheduler starts it again within five minutes. To stop it for longer, disable the task
and then stop it.

Needs Windows 10, or Windows Server 2016, or newer, with Windows PowerShell 5.1. It has never been run, since the project is
developed without a Windows computer: it was read, and parsed by a test.

.EXAMPLE
powershell -ExecutionPolicy Bypass -File install.ps1 -MetquayHost lab.metquay.co -ForMe
#>
[CmdletBinding()]
param(
    # Your Metquay server.
    [Parameter(Mandatory)] [string] $MetquayHost,
    # For yourself rather than for the whole computer.
    [switch] $ForMe
)
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

function Invoke-Program {
    # PowerShell does not stop by itself where a program fails.
    $program = $args[0]
    $arguments = @($args | Select-Object -Skip 1)
    & $program @arguments
    if ($LASTEXITCODE -ne 0) { throw "$program ended with exit code $LASTEXITCODE" }
}

$user = [Security.Principal.WindowsIdentity]::GetCurrent()
$administrators = [Security.Principal.WindowsBuiltInRole]::Administrator
if (-not $ForMe -and -not ([Security.Principal.WindowsPrincipal] $user).IsInRole($administrators)) {
    throw 'Run this in a PowerShell that was started as administrator, or add -ForMe to install it for yourself alone.'
}
if (-not [Environment]::Is64BitProcess) { throw 'This is a 32-bit PowerShell. Run this in the 64-bit one.' }
$parts = 'metquay-proxy.exe', 'metquay-proxyw.exe', 'metquay-keys.exe', '_internal', 'licences', 'install.ps1', 'uninstall.ps1'
foreach ($part in $parts) {
    if (-not (Test-Path -LiteralPath "$PSScriptRoot\$part")) {
        throw "$part is missing in $PSScriptRoot. Unpack the whole archive of a release, and run the install.ps1 in it."
    }
}
# In Program Files only an administrator can write: nobody else can have put a program or a folder there before.
$folder = if ($ForMe) { "$env:LOCALAPPDATA\metquay-proxy" } else { "$env:ProgramFiles\metquay-proxy" }
$task = if ($ForMe) { "metquay-proxy-$env:USERNAME" } else { 'metquay-proxy' }
if ($PSScriptRoot -eq $folder) {
    throw "This is the installed copy in $folder, which can't replace itself. Unpack the archive into another folder, for example" +
    ' Downloads, and run the install.ps1 there.'
}

# Windows marks what was downloaded, and asks before it runs that; whoever installs it has decided.
Get-ChildItem -LiteralPath $PSScriptRoot -Recurse -File | Unblock-File
# The keys first: as long as one is missing, nothing is changed.
$keys = @{}
if ($ForMe) {
    & "$PSScriptRoot\metquay-keys.exe"
    if ($LASTEXITCODE -ne 0) { throw 'Nothing was installed, because a key is missing. Run install.ps1 again, and paste both keys.' }
}
else {
    foreach ($name in 'METQUAY_ACCESS_KEY', 'METQUAY_SECRET_KEY') {
        do {
            Write-Output "Paste $name by a right click (not by Ctrl+V), then press Enter. The key is not shown."
            $secret = Read-Host -AsSecureString -Prompt 'To keep the key that is stored, press only Enter'
            $key = [Net.NetworkCredential]::new('', $secret).Password.Trim()
            $wrong = $key -notmatch '^[!-~]*$'
            if ($wrong) { Write-Warning 'That is no key: it contains a character that is not a letter, a digit or a common sign.' }
        } while ($wrong)
        if ($key) { $keys[$name] = $key }
        elseif (-not (Test-Path -LiteralPath "$folder\keys\$name")) {
            throw "Nothing was installed, because $name is missing. Run install.ps1 again, and paste both keys."
        }
        else { Write-Output "$name stays as it is." }
    }
}

# An older installation.
Get-ScheduledTask -TaskName $task -ErrorAction SilentlyContinue | ForEach-Object {
    Stop-ScheduledTask -InputObject $_ -ErrorAction Stop
    Unregister-ScheduledTask -InputObject $_ -Confirm:$false -ErrorAction Stop
}
Start-Sleep -Seconds 3 # a program that was just told to end is not gone yet
Get-Process | Where-Object { $_.Path -like "$folder\*" } | Stop-Process -Force -PassThru | Wait-Process
foreach ($part in $parts) {
    if (Test-Path -LiteralPath "$folder\$part") { Remove-Item -LiteralPath "$folder\$part" -Recurse -Force }
}

New-Item -ItemType Directory -Force -Path $folder, "$folder\logs" | Out-Null
foreach ($part in $parts) { Copy-Item -LiteralPath "$PSScriptRoot\$part" -Destination $folder -Recurse }
if (Test-Path -LiteralPath "$folder\.env") {
    Write-Warning "The settings in $folder\.env were kept, and -MetquayHost was not used: see that METQUAY_HOST is right there."
}
else {
    $lines = @(
        "METQUAY_HOST=$MetquayHost", '# info: one line for each request', 'METQUAY_LOG_LEVEL=warning', 'METQUAY_LOG_FORMAT=console'
    )
    if (-not $ForMe) {
        $lines += "METQUAY_ACCESS_KEY_FILE=$folder\keys\METQUAY_ACCESS_KEY"
        $lines += "METQUAY_SECRET_KEY_FILE=$folder\keys\METQUAY_SECRET_KEY"
    }
    [IO.File]::WriteAllLines("$folder\.env", [string[]] $lines)
}
if (-not $ForMe) {
    # SYSTEM, Administrators and LOCAL SERVICE by their numbers, since names are translated. Before any key is written.
    New-Item -ItemType Directory -Force -Path "$folder\keys" | Out-Null
    $full = '*S-1-5-18:(OI)(CI)F', '*S-1-5-32-544:(OI)(CI)F'
    Invoke-Program icacls.exe "$folder\keys" /inheritance:r /grant:r $full[0] $full[1] '*S-1-5-19:(OI)(CI)RX'
    Invoke-Program icacls.exe "$folder\logs" /inheritance:r /grant:r $full[0] $full[1] '*S-1-5-19:(OI)(CI)M'
    Invoke-Program icacls.exe "$folder\.env" /inheritance:r /grant:r '*S-1-5-18:F' '*S-1-5-32-544:F' '*S-1-5-19:R'
    foreach ($name in $keys.Keys) { [IO.File]::WriteAllText("$folder\keys\$name", $keys[$name]) }
}

# The program that opens no window, in the folder where it finds .env and writes its log.
$action = New-ScheduledTaskAction -Execute "$folder\metquay-proxyw.exe" -Argument 'serve' -WorkingDirectory $folder
if ($ForMe) {
    $start = New-ScheduledTaskTrigger -AtLogOn -User $user.Name
    $principal = New-ScheduledTaskPrincipal -UserId $user.Name -LogonType Interactive
}
else {
    $start = New-ScheduledTaskTrigger -AtStartup
    $principal = New-ScheduledTaskPrincipal -UserId 'S-1-5-19' -LogonType ServiceAccount
}
# And every five minutes from now on: a proxy that runs is not started twice (IgnoreNew).
$again = New-ScheduledTaskTrigger -Once -At (Get-Date) -RepetitionInterval (New-TimeSpan -Minutes 5)
# By default a task is ended after three days, and on a laptop that runs on its battery, and has to wait for other programs.
$conditions = New-ScheduledTaskSettingsSet -ExecutionTimeLimit ([TimeSpan]::Zero) -MultipleInstances IgnoreNew -Priority 4 `
    -StartWhenAvailable -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries
Register-ScheduledTask -TaskName $task -Description 'Authenticating proxy for the Metquay API' -Action $action `
    -Trigger $start, $again -Principal $principal -Settings $conditions -Force -ErrorAction Stop | Out-Null
Start-ScheduledTask -TaskName $task -ErrorAction Stop

Push-Location -LiteralPath $folder # where .env is
& "$folder\metquay-proxy.exe" health --ready --wait 30
$ready = $LASTEXITCODE -eq 0
& "$folder\metquay-proxy.exe" check
Pop-Location
if (-not $ready -or $LASTEXITCODE -ne 0) {
    Write-Warning "metquay-proxy is installed in $folder, but something is wrong: see above, and $folder\logs\proxy.log."
    exit 1
}
Write-Output "metquay-proxy is installed in $folder. Settings: $folder\.env"
