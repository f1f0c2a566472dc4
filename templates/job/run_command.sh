#!/bin/sh
# The job of the engine "command", started in its job directory: fetches the raw data, then calls the site's command.
# Every value below was quoted for the shell by the service; nothing of a request is interpreted here.
set -eu
cd "$(dirname "$0")"

# Plain mkdir on purpose: a job directory is used once, and what an earlier run left is never mixed in.
mkdir rawdata working products auxiliary
products=$(pwd)/products

{% if raw_fetch %}
fetch() {
    printf 'Fetching the raw data of %s ...\n' "$1"
    (cd rawdata && {{ raw_fetch | map("shell_quote") | join(" ") }} "$1" </dev/null)
}

{% for execution_block in execution_blocks %}
fetch {{ execution_block | shell_quote }}
{% endfor %}

{% endif %}
{% if casa_home %}
STAGECAL_CASA_HOME={{ casa_home | shell_quote }}
export STAGECAL_CASA_HOME

{% endif %}
set -- {{ project | shell_quote }} {{ mous | shell_quote }} "$products"
{% if calfields %}
set -- "$@" --calfields {{ calfields | join(",") | shell_quote }}
{% endif %}
{% for execution_block in execution_blocks %}
set -- "$@" {{ execution_block | shell_quote }}
{% endfor %}

echo 'Now generating the calibrated MS(s) ...'
cd working
exec {{ command | shell_quote }} "$@" </dev/null
