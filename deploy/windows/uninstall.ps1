<#
.SYNOPSIS
Removes what install.ps1 made: the task, the program, its settings and logs, and the keys.

.DESCRIPTION
With -ForMe what was installed with -ForMe, else what was installed for the whole computer, as administrator. Like install.ps1
it has never been run: it was read, and parsed by a test.

.EXAMPLE
powershell -ExecutionPolicy Bypass -File uninstall.ps1 -ForMe
#>
[CmdletBinding()]
param(
    # What was installed for yourself rather than for the whole computer.
    [switch] $ForMe
)
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

$folder = if ($ForMe) { "$env:LOCALAPPDATA\metquay-proxy" } else { "$env:ProgramFiles\metquay-proxy" }
$task = if ($ForMe) { "metquay-proxy-$env:USERNAME" } else { 'metquay-proxy' }
if (-not (Test-Path -LiteralPath $folder) -and -not (Get-ScheduledTask -TaskName $task -ErrorAction SilentlyContinue)) {
    throw "metquay-proxy is not installed in $folder. If it was installed with -ForMe, add that here too; otherwise leave it out."
}
$user = [Security.Principal.WindowsPrincipal] [Security.Principal.WindowsIdentity]::GetCurrent()
if (-not $ForMe -and -not $user.IsInRole([Security.Principal.WindowsBuiltInRole]::Administrator)) {
    throw 'Run this in a PowerShell that was started as administrator.'
}
Get-ScheduledTask -TaskName $task -ErrorAction SilentlyContinue | ForEach-Object {
    Stop-ScheduledTask -InputObject $_ -ErrorAction Stop
    Unregister-ScheduledTask -InputObject $_ -Confirm:$false -ErrorAction Stop
}
Start-Sleep -Seconds 3 # a program that was just told to end is not gone yet
Get-Process | Where-Object { $_.Path -like "$folder\*" } | Stop-Process -Force -PassThru | Wait-Process
if ($ForMe) {
    $removed = Test-Path -LiteralPath "$folder\metquay-keys.exe"
    if ($removed) {
        & "$folder\metquay-keys.exe" --remove
        $removed = $LASTEXITCODE -eq 0
    }
    if (-not $removed) { Write-Warning 'The keys may still be in Credential Manager: look for METQUAY there, and remove them.' }
}
# A folder that a program works in can't be removed.
Set-Location -LiteralPath "$env:SystemDrive\"
[Environment]::CurrentDirectory = "$env:SystemDrive\"
if (Test-Path -LiteralPath $folder) { Remove-Item -LiteralPath $folder -Recurse -Force }
