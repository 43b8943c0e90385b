<#
.SYNOPSIS
Removes what install.ps1 made: the task, the program, its settings and logs, and the keys.

.DESCRIPTION
As administrator; with -ForMe what was installed with -ForMe. Like install.ps1 it was read and parsed, but not run, by the
project.

.EXAMPLE
powershell -ExecutionPolicy Bypass -File uninstall.ps1 -ForMe
#>
[CmdletBinding()]
param(
    # What was installed for the signed-in user rather than for the machine.
    [switch] $ForMe
)
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

$folder = if ($ForMe) { "$env:LOCALAPPDATA\metquay-proxy" } else { "$env:ProgramFiles\metquay-proxy" }
Get-ScheduledTask -TaskName 'metquay-proxy' -ErrorAction SilentlyContinue | ForEach-Object {
    Stop-ScheduledTask -InputObject $_
    Unregister-ScheduledTask -InputObject $_ -Confirm:$false
}
Get-Process | Where-Object { $_.Path -like "$folder\*" } | Stop-Process -Force -PassThru | Wait-Process
if ($ForMe) { & "$folder\metquay-keys.exe" --remove }
Set-Location -LiteralPath "$env:SystemDrive\" # a folder that somebody is in can't be removed
Remove-Item -LiteralPath $folder -Recurse -Force
