#!/bin/sh
# Runs ./run.sh once, ends it when it may live no longer, and tells in files what became of it.
#
#     STAGECAL_NONCE=... setsid sh ./wrapper.sh [INTERVAL [GRACE]]
#
# is started in the job directory as the leader of a session of its own. INTERVAL (seconds, 30) lies between two looks
# at the lease, GRACE (whole seconds, 10) between TERM and KILL. Every file appears whole, by rename:
#
#     lock/      whoever makes it has the only right to start run.sh, or to rule that it never starts
#     pid        "PID START_TIME BOOT_ID NONCE" of this wrapper
#     exit       run.sh's exit status, once every process of the job is gone
#     ended      why the job was ended from outside: lease, cancelled, signal, wrapper (this one was killed)
#     lease      read: seconds since 1970 until which the job may live; without a readable one it may not live
#     cancel     read: if it is there, the job is ended
#
# Only what a twenty years old userland has: sh, date, grep, mkdir, mv, setsid, sleep, and /proc.

interval=${1:-30}
grace=${2:-10}
umask 027

publish() { # NAME TEXT WRITER
    { echo "$2" > "$1.$3" && mv "$1.$3" "$1"; } 2>/dev/null
}

# The numbers of /proc/PID/stat follow the program's name, which may hold blanks and brackets itself. A zombie is dead.
start_time() { # PID
    { read -r stat < "/proc/$1/stat"; } 2>/dev/null || return 1
    set -- ${stat##*") "}
    case $1 in Z | X) return 1 ;; esac
    echo "${20}"
}
session_of() { # PID
    { read -r stat < "/proc/$1/stat"; } 2>/dev/null || return 1
    set -- ${stat##*") "}
    echo "$4"
}

nap() {
    sleep 0.2 2>/dev/null || sleep 1
}

# Sets `groups` to the process groups of all that carries the job's nonce, wherever it went, but those of the wrapper's
# own session. A whole group is signalled because some of it may have wiped its environment (and kernels before 2.6.24
# show only its first page); a group in which one carries the nonce cannot be anybody else's.
find_groups() {
    groups=
    for path in $(grep -lzxF "STAGECAL_NONCE=$STAGECAL_NONCE" /proc/[0-9]*/environ 2>/dev/null); do
        { read -r stat < "${path%/environ}/stat"; } 2>/dev/null || continue
        set -- ${stat##*") "}
        [ "$4" != "$session" ] || continue
        case " $groups " in *" -$3 "*) ;; *) groups="$groups -$3" ;; esac
    done
    [ -n "$groups" ]
}

# Returns when no process of the job lives, however long that takes: what cannot be killed still holds its slot.
end_everyone() {
    find_groups || return 0
    kill -s TERM -- $groups 2>/dev/null
    naps=0
    while find_groups; do
        [ "$naps" -lt $((grace * 5)) ] || kill -s KILL -- $groups 2>/dev/null
        naps=$((naps + 1))
        nap
    done
}

# The side watcher. A lease that cannot be read just now (a file server's trouble) counts as the last one that was read.
watch() {
    deadline=0
    while :; do
        { read -r lease < lease; } 2>/dev/null || lease=
        case $lease in '' | *[!0-9]*) ;; *) deadline=$lease ;; esac
        reason=
        [ "$(date +%s)" -lt "$deadline" ] || reason=lease
        [ ! -e cancel ] || reason=cancelled
        [ ! -e ended ] || reason=ended
        [ "$(start_time $$)" = "$own_start" ] || reason=wrapper
        if [ -n "$reason" ]; then
            [ -e ended ] || publish ended "$reason" watcher
            end_everyone
        fi
        if [ "$reason" = wrapper ]; then
            # What it was just starting when it died may have been on its way out of the wrapper's session.
            nap
            end_everyone
            return
        fi
        sleep "$interval"
    done
}

# TERM may come when nobody waits for run.sh yet. Therefore the job is ended here, and by the watcher if it was only
# just about to start.
stop() {
    trap '' TERM INT
    stopped=yes
    reason=signal
    [ ! -e cancel ] || reason=cancelled
    [ -e ended ] || publish ended "$reason" wrapper
    end_everyone
}

mkdir lock 2>/dev/null || exit 0
session=$(session_of $$)
own_start=$(start_time $$)
read -r boot < /proc/sys/kernel/random/boot_id
# The job's terminal is nobody's: a hangup means nothing. TERM is caught, not ignored, so that run.sh does not inherit it.
trap '' HUP
stopped=
trap stop TERM INT
publish pid "$$ $own_start $boot $STAGECAL_NONCE" wrapper || exit 1

# The watcher comes first, so that run.sh is never alone.
watch &
watcher=$!
child=
code=143
if [ ! -e cancel ] && [ ! -e ended ]; then
    # A session of its own for the job, so that all of it can be killed and this wrapper still tells the end.
    if [ -x ./run.sh ]; then setsid ./run.sh & else setsid sh ./run.sh & fi
    child=$!
    wait "$child"
    code=$?
fi

trap '' TERM INT
[ ! -e cancel ] || [ -e ended ] || publish ended cancelled wrapper
end_everyone
if [ -n "$stopped" ] && [ -n "$child" ]; then
    # The first wait was interrupted by the signal; 127 says that it was not and has the status already.
    wait "$child" 2>/dev/null
    second=$?
    [ "$second" = 127 ] || code=$second
fi

# The watcher and its sleep are the last processes of the wrapper's session besides us, gone before the end is told.
# The watcher gets KILL: just forked, it might still catch TERM as we did. Some shells talk about that; the job's output
# is complete.
exec 2>/dev/null
kill -s KILL "$watcher"
kill -s TERM -- "-$$"
kill -s CONT -- "-$$"
wait

# A full disk may have room again soon. If not, the end without a status is found as LOST.
tries=0
until publish exit "$code" wrapper; do
    tries=$((tries + 1))
    [ "$tries" -lt 20 ] || exit 1
    sleep "$interval"
done
