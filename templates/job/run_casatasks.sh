#!/bin/sh
# The job of the engine "casatasks", started in its job directory: fetches what the archive keeps of the MOUS, then lets
# the tasks of a modular CASA restore and split the calibrated measurement sets.
# Every value below was quoted for the shell by the service; nothing of a request is interpreted here.
set -eu
cd "$(dirname "$0")"

# A site's script that makes example data by CASA finds it by this variable.
STAGECAL_CASA_WORKER={{ python[0] | shell_quote }}
export STAGECAL_CASA_WORKER

{% include "job/area.sh" %}

echo 'Now generating the calibrated MS(s) ...'
# calibrate.py takes no arguments, because CASA would read them as its own.
exec "$python" -E -s -u calibrate.py </dev/null
