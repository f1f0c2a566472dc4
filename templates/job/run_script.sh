#!/bin/sh
# The job of the engine "script", started in its job directory: lets a monolithic CASA run the restore script that the
# archive has of this MOUS, then splits the calibrated measurement sets.
# Every value below was quoted for the shell by the service; nothing of a request is interpreted here.
set -eu
cd "$(dirname "$0")"

{% set monolithic = true %}
{% include "job/area.sh" %}

script=$job/products/{{ restore_script | shell_quote }}
[ -f "$script" ] || fail "the archive's restore script is not in products/"

echo 'Now generating the calibrated MS(s) ...'
# The script names raw data as they lie in ../rawdata.
cd {{ area | shell_quote }}/working
STAGECAL_COMMAND='casa --nologger --nogui --pipeline -c '{{ restore_script | shell_quote }}
export STAGECAL_COMMAND
casa --pipeline -c "$script" || fail "CASA ended with exit code $?"
finish
