#!/bin/sh
# The job of the engine "pipeline", started in its job directory: lets the ALMA pipeline of a monolithic CASA restore the
# MOUS by a pipeline processing request, then splits the calibrated measurement sets.
# Every value below was quoted for the shell by the service; nothing of a request is interpreted here.
set -eu
cd "$(dirname "$0")"

{% set monolithic = true %}
{% include "job/area.sh" %}

echo 'Now generating the calibrated MS(s) ...'
cp {{ ppr_name | shell_quote }} {{ area | shell_quote }}/working/
# CASA has to be started in working/.
cd {{ area | shell_quote }}/working
STAGECAL_COMMAND='casa --nologger --nogui --pipeline -c runpipeline.py '{{ ppr_name | shell_quote }}
export STAGECAL_COMMAND
casa --pipeline -c "$runpipeline" {{ ppr_name | shell_quote }} || fail "CASA ended with exit code $?"
finish
