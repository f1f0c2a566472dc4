{# Included by the jobs that restore: makes the directories, reserves the space, fetches products and raw data.
   Given: area (where the restore works, relative; "." is the flat layout), execution_blocks, raw_fetch, raw_size,
   disk_factor, python (programs to try, the first that runs is taken); with monolithic also casa_home and xvfb.
   Leaves the variables job and python; for a monolithic CASA also runpipeline, its environment, and the function casa. #}
fail() {
    printf 'run.sh: failed: %s\n' "$1" >&2
    exit 1
}

{% if monolithic is defined %}
# A node that lacks something is known before hours of fetching.
casa_home={{ casa_home | shell_quote }}
[ -x "$casa_home/bin/casa" ] || fail "there is no $casa_home/bin/casa on this node"
runpipeline=
for candidate in "$casa_home"/pipeline/pipeline/runpipeline.py "$casa_home"/lib/py/lib/python3*/site-packages/pipeline/runpipeline.py \
    "$casa_home"/lib/python3*/site-packages/pipeline/runpipeline.py "$casa_home"/lib/casa/pipeline/pipeline/runpipeline.py; do
    [ ! -f "$candidate" ] || runpipeline=$candidate
done
[ -n "$runpipeline" ] || fail "the CASA in $casa_home has no pipeline (runpipeline.py): it is not the one that is needed"
{% if xvfb %}
command -v xvfb-run >/dev/null || fail "there is no xvfb-run on this node, and [restore] xvfb asks for it"
{% endif %}
casa() {
    {{ "xvfb-run -a " if xvfb else "" }}"$casa_home/bin/casa" --nologger --nogui "$@" </dev/null
}

{% endif %}
# Plain mkdir on purpose: a job directory is used once, and what an earlier run left is never mixed in.
job=$(pwd -P)
mkdir products auxiliary
{% if area == "." %}
mkdir rawdata working
{% else %}
# The directories of the observatories. What is looked for at the top of the job directory is found there, too.
area={{ area | shell_quote }}
mkdir -p "$area"
mkdir "$area/rawdata" "$area/working"
ln -s "$job/products" "$area/products"
ln -s "$area/rawdata" rawdata
ln -s "$area/working" working
{% endif %}

python=
for candidate in {{ python | map("shell_quote") | join(" ") }}; do
    # What the scripts are written in begins with 2.7; nodes of old CASA have older ones besides.
    if "$candidate" -c 'import fcntl, json, sys; sys.exit(sys.version_info < (2, 7))' </dev/null >/dev/null 2>&1; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "none of these programs is a Python that can be used (2.7 or later): "{{ python | join(", ") | shell_quote }}

# CASA is not started where locks do not lock. That is known before anything is fetched.
"$python" -B -c 'import sys, calibrate; sys.exit(calibrate.check_locks())' </dev/null

# Promises so many kilobytes of this file system to this job. What jobs were promised here and have not used yet counts as
# used: a disk that two jobs fill together fails both. Only one job at a time counts.
reserve() {
    exec 9>>../reserve.lock
    "$python" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'
    free=$(df -Pk . | sed -n '$s/.* \([0-9][0-9]*\)  *[0-9][0-9]*%.*/\1/p')
    used=$(du -sk . | cut -f 1)
    needed=$(($1 > used ? $1 - used : 0))
    for other in ../WORK*/reserved; do
        directory=${other%/reserved}
        [ "${directory##*/}" != "${job##*/}" ] && [ -f "$other" ] && [ ! -e "$directory/exit" ] || continue
        read -r promised <"$other" || continue
        used=$(du -sk "$directory" 2>/dev/null | cut -f 1)
        [ "$promised" -le "${used:-0}" ] || free=$((free - promised + ${used:-0}))
    done
    [ "$free" -ge "$needed" ] ||
        fail "the work area has $free kB for this job, and about $needed kB are needed: make room, and start it again"
    echo "$1" >reserved
    exec 9>&-
}

{% if raw_size %}
total=0
for execution_block in {{ execution_blocks | map("shell_quote") | join(" ") }}; do
    size=$({{ raw_size | map("shell_quote") | join(" ") }} "$execution_block" </dev/null) || size=
    case $size in
        # A zero in front would make it octal; no execution block has a petabyte.
        '' | 0* | *[!0-9]* | ????????????????*)
            size=$(printf '%.60s' "$size" | tr -c '[:print:]' ' ')
            fail "the size of the raw data of $execution_block is unknown: [restore] raw_size printed '$size', not bytes"
            ;;
    esac
    total=$((total + size / 1024 + 1))
done
echo "The raw data have $total kB; {{ disk_factor }} times as much is reserved."
reserve $((total * {{ disk_factor }}))
{% endif %}

echo 'Fetching the archived products ...'
"$python" -B -u fetch_products.py fetch.json </dev/null

fetch() {
    printf 'Fetching the raw data of %s ...\n' "$1"
    (cd rawdata && {{ raw_fetch | map("shell_quote") | join(" ") }} "$1" </dev/null) || fail "the raw data of $1 were not fetched"
}

{% for execution_block in execution_blocks %}
fetch {{ execution_block | shell_quote }}
{% endfor %}
{% if not raw_size %}
# Nobody knew the size before. Still it is better to fail now than in the middle of the calibration.
total=$(du -skL rawdata/ | cut -f 1)
echo "The raw data have $total kB; {{ disk_factor }} times as much is reserved."
reserve $((total * {{ disk_factor }}))
{% endif %}
{% if monolithic is defined %}

# What CASA would pass over, or notice only after hours.
{% for execution_block in execution_blocks %}
{% set asdm = "rawdata/" ~ execution_block | replace(":", "_") | replace("/", "_") ~ "/ASDM.xml" %}
[ -f {{ asdm | shell_quote }} ] || fail {{ ("there is no " ~ asdm ~ ": raw_fetch left no ASDM of " ~ execution_block) | shell_quote }}
{% endfor %}
"$python" -B -c 'import sys, calibrate; sys.exit(calibrate.check_raw_data())' </dev/null
set -- products/*pipeline_manifest.xml
[ $# -eq 1 ] || fail "products/ has $# manifests, and the pipeline would take the first one: $*"
for archive in products/*.tgz; do
    gzip -t "$archive" || fail "$archive is damaged"
done

# What the pipeline reads: its root (the working directory is <root>/<RelativePath>/working), where it logs, its recipes.
# The job directory itself is the first part of RelativePath.
SCIPIPE_ROOTDIR=$(dirname "$job")
SCIPIPE_LOGDIR=$job/Logs
SCIPIPE_SCRIPTDIR=$(dirname "$runpipeline")/recipes
STAGECAL_JOB=$job
export SCIPIPE_ROOTDIR SCIPIPE_LOGDIR SCIPIPE_SCRIPTDIR STAGECAL_JOB
mkdir Logs

# Splits what CASA left in working/, the current directory. The exit code of CASA says nothing of success: finish_restore.py
# looks at what there is, and a report.json is there only if it found everything right.
finish() {
    casa --logfile "$job/Logs/finish.log" -c "$job/finish_restore.py" || exit $?
    [ -f "$job/report.json" ] || fail "CASA ended without a word before finish_restore.py had looked at everything"
}
{% endif %}
