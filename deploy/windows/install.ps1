<#
.SYNOPSIS
Installs metquay-proxy, which needs no Python, or a newer version of it, and lets Task Scheduler run it.

.DESCRIPTION
For the whole machine, as administrator: it runs from the machine's start as LOCAL SERVICE, an account with few rights. The
keys lie in two files that only that account, SYSTEM and administrators can read.

With -ForMe, for yourself: it runs while you are signed in, and the keys lie in your Credential Manager.

Run it again to change a key or to install a newer version: requests that are under way then are lost.

Program, .env, keys and logs\proxy.log lie in one folder, which it names at the end. More settings go into .env; restart the
task then. Whatever ends the proxy, Task Scheduler starts it again within five minutes; to stop it for longer, disable the task.

Needs Windows 10, or Windows Server 2016, or newer, with Windows PowerShell 5.1. There is no Windows where this project is
developed: this script was read, and parsed by a test, but not run.

.EXAMPLE
powershell -ExecutionPolicy Bypass -File install.ps1 -MetquayHost lab.metquay.co -ForMe
#>
[CmdletBinding()]
param(
    # Your Metquay server.
    [Parameter(Mandatory)] [string] $MetquayHost,
    # For the signed-in user rather than for the machine.
    [switch] $ForMe
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
$parts = 'metquay-proxy.exe', 'metquay-proxyw.exe', 'metquay-keys.exe', '_internal', 'licences', 'install.ps1', 'uninstall.ps1'
foreach ($part in $parts) {
    if (-not (Test-Path -LiteralPath "$PSScriptRoot\$part")) {
        throw "$part is missing in $PSScriptRoot. Unpack the whole archive of a release, and run the install.ps1 in it."
    }
}

# In Program Files only an administrator can write: nobody else can have laid a program or a folder there before.
$folder = if ($ForMe) { "$env:LOCALAPPDATA\metquay-proxy" } else { "$env:ProgramFiles\metquay-proxy" }
if ($PSScriptRoot -eq $folder) { throw "Unpack the archive into another folder than $folder, and run install.ps1 there." }

# An older installation.
Get-ScheduledTask -TaskName $task -ErrorAction SilentlyContinue | ForEach-Object {
    Stop-ScheduledTask -InputObject $_
    Unregister-ScheduledTask -InputObject $_ -Confirm:$false
}
Get-Process | Where-Object { $_.Path -like "$folder\*" } | Stop-Process -Force -PassThru | Wait-Process
foreach ($part in $parts) {
    if (Test-Path -LiteralPath "$folder\$part") { Remove-Item -LiteralPath "$folder\$part" -Recurse -Force }
}

New-Item -ItemType Directory -Force -Path $folder, "$folder\logs" | Out-Null
if (-not $ForMe) {
    # SYSTEM, Administrators and LOCAL SERVICE by their numbers, since names are translated. Before any key is written.
    $full = '*S-1-5-18:(OI)(CI)F', '*S-1-5-32-544:(OI)(CI)F'
    Invoke-Program icacls.exe $folder /inheritance:r /grant:r $full[0] $full[1] '*S-1-5-19:(OI)(CI)RX'
    Invoke-Program icacls.exe "$folder\logs" /grant:r '*S-1-5-19:(OI)(CI)M'
}
foreach ($part in $parts) { Copy-Item -LiteralPath "$PSScriptRoot\$part" -Destination $folder -Recurse }
# Windows marks what was downloaded, and asks before it runs that; whoever installs it has decided.
Get-ChildItem -LiteralPath $folder -Recurse -File | Unblock-File

if ($ForMe) {
    Invoke-Program "$folder\metquay-keys.exe"
}
else {
    foreach ($name in 'METQUAY_ACCESS_KEY', 'METQUAY_SECRET_KEY') {
        $secret = Read-Host -AsSecureString -Prompt "Paste $name (Enter alone keeps the key that is there)"
        $key = [Net.NetworkCredential]::new('', $secret).Password
        if ($key) { [IO.File]::WriteAllText("$folder\$name", $key) }
    }
}
if (Test-Path -LiteralPath "$folder\.env") {
    Write-Warning "$folder\.env was there and is kept: see that METQUAY_HOST is right in it."
}
else {
    $lines = @(
        "METQUAY_HOST=$MetquayHost", '# info: one line for each request', 'METQUAY_LOG_LEVEL=warning', 'METQUAY_LOG_FORMAT=console'
    )
    if (-not $ForMe) {
        $lines += "METQUAY_ACCESS_KEY_FILE=$folder\METQUAY_ACCESS_KEY"
        $lines += "METQUAY_SECRET_KEY_FILE=$folder\METQUAY_SECRET_KEY"
    }
    [IO.File]::WriteAllLines("$folder\.env", [string[]] $lines)
}

# The program without a window, in the folder where it finds .env and makes its log.
$action = New-ScheduledTaskAction -Execute "$folder\metquay-proxyw.exe" -Argument 'serve' -WorkingDirectory $folder
if ($ForMe) {
    $trigger = New-ScheduledTaskTrigger -AtLogOn -User $user.Name
    $principal = New-ScheduledTaskPrincipal -UserId $user.Name -LogonType Interactive
}
else {
    $trigger = New-ScheduledTaskTrigger -AtStartup
    $principal = New-ScheduledTaskPrincipal -UserId 'LOCALSERVICE' -LogonType ServiceAccount
}
# Only this kind of trigger takes an interval; a proxy that runs is not started twice (IgnoreNew).
$again = New-ScheduledTaskTrigger -Once -At (Get-Date) -RepetitionInterval (New-TimeSpan -Minutes 5)
$trigger.Repetition = $again.Repetition
# By default a task is ended after three days, and on a laptop that runs on its battery.
$conditions = New-ScheduledTaskSettingsSet -ExecutionTimeLimit ([TimeSpan]::Zero) -MultipleInstances IgnoreNew `
    -StartWhenAvailable -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries
Register-ScheduledTask -TaskName $task -Description 'Authenticating proxy for the Metquay API' -Action $action `
    -Trigger $trigger -Principal $principal -Settings $conditions -Force | Out-Null
Start-ScheduledTask -TaskName $task

Push-Location -LiteralPath $folder # where .env is
& "$folder\metquay-proxy.exe" health --ready --wait 30
Pop-Location
if ($LASTEXITCODE -eq 0) { Write-Output "Ready at http://localhost:6387. Settings: $folder\.env" }
else { Write-Warning "Not ready yet. Settings: $folder\.env; what the proxy says: $folder\logs\proxy.log" }
