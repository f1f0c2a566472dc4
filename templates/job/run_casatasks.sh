#!/bin/sh
# The job of the engine "casatasks", started in its job directory: fetches the raw data, then lets CASA calibrate.
# Every value below was quoted for the shell by the service; nothing of a request is interpreted here.
set -eu
cd "$(dirname "$0")"

worker_python={{ worker_python | shell_quote }}

# Plain mkdir on purpose: a job directory is used once, and what an earlier run left is never mixed in.
mkdir rawdata working products auxiliary

# CASA is not started where locks do not lock. That is known before anything is fetched.
"$worker_python" -B -E -s -c 'import sys, calibrate; sys.exit(calibrate.check_locks())' </dev/null

# A raw-data script that makes example data by CASA finds it by this variable.
STAGECAL_CASA_WORKER=$worker_python
export STAGECAL_CASA_WORKER

fetch() {
    printf 'Fetching the raw data of %s ...\n' "$1"
    (cd rawdata && {{ raw_fetch | map("shell_quote") | join(" ") }} "$1" </dev/null)
}

{% for execution_block in execution_blocks %}
fetch {{ execution_block | shell_quote }}
{% endfor %}

echo 'Now generating the calibrated MS(s) ...'
# calibrate.py takes no arguments, because CASA would read them as its own.
exec "$worker_python" -E -s -u calibrate.py </dev/null
