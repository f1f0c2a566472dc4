#!/bin/sh
# The job of the engine "command", started in its job directory: fetches the raw data, then calls the site's command.
# Every value below was quoted for the shell by the service; nothing of a request is interpreted here.
set -eu
cd "$(dirname "$0")"

# Plain mkdir on purpose: a job directory is used once, and what an earlier run left is never mixed in.
mkdir rawdata working products auxiliary
products=$(pwd)/products

# Where locks do not lock, measurement sets get damaged. Here one process holds a lock that another one tries to get.
locks=
if command -v flock >/dev/null 2>&1; then
    probe=working/.lock-probe
    if ! flock -n "$probe" true || flock -n "$probe" flock -n "$probe" true; then
        echo "run.sh: failed: locks do not lock in $(pwd): the calibration is not started there, because measurement" \
            "sets would get damaged: mount the file system with locks (Lustre: -o flock)" >&2
        exit 1
    fi
    rm -f "$probe"
    locks=yes
else
    echo "There is no flock(1) here: nobody looked whether locks lock, and the raw measurement sets are not locked."
fi

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

set -- {{ command | shell_quote }} "$@"

# The command holds the lock of every raw measurement set that was fetched, by the rule of `stagecal ms lock`.
note='printf "{\"host\": \"%s\", \"pid\": %s, \"command\": \"%s\", \"since\": \"%s\"}\\n" "$(uname -n)" $$ run.sh \
    "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >"$0" || :; exec "$@"'
for raw in rawdata/*/*.ms; do
    [ -n "$locks" ] && [ -d "$raw" ] || continue
    lock=$(cd "$raw" && pwd -P).lock
    if [ ! -w "$lock" ] && [ ! -w "$(dirname "$lock")" ] && [ ! -w "$raw" ]; then
        echo "$raw is used without a lock: we may only read it, and cannot make $lock"
        continue
    fi
    flock -n "$lock" true || echo "Waiting for $lock (an hour at most), held by: $(cat "$lock")"
    set -- flock -w 3600 "$lock" sh -c "$note" "$lock" "$@"
done

echo 'Now generating the calibrated MS(s) ...'
cd working
exec "$@" </dev/null
