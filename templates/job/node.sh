#!/bin/sh
# Does one thing on a node for one job, and tells it in lines of "NAME VALUE" on standard output.
#
#     sh node.sh VERB WORK_AREA [WORK NONCE TOKEN [ARGUMENT ...]]
#
#     loads                      answer each line of standard input with "LOAD CORES SECONDS" (since 1970)
#     clock                      tell the seconds since 1970
#     prepare SIZE SHA256        make the job directory from a tar file on standard input
#     launch LEASE NAMES COMMAND start COMMAND in it with nothing but these variables of the environment, and the nonce
#     look                       tell what its files and the processes of the node show
#     rule REASON                take the lock, so that the job never starts
#     lease TEXT                 replace the lease
#     cancel                     ask the wrapper to end the job, or take the lock if it is free
#     terminate PID START BOOT   signal the wrapper, if this is still the process
#     kill                       kill every process that carries the nonce
#     output BYTES               write the end of the terminal output
#     remove                     remove the job directory
#     list                       list the results
#     digest                     write the SHA-256 of the files whose names (each with a NUL) are on standard input
#     send                       write these files as a tar file
#     check KIB PYTHON [CASA_HOME ...]
#                                try what jobs need of the node: this free space, a Python with casatasks (or -)
#
# WORK and NONCE are - for loads, clock and check, which belong to no job.
#
# TOKEN makes names unique. It ends with 70 if a person has to look, 75 if waiting may help, 74 if the words of the
# system on standard error tell which of them. Nothing outside WORK_AREA/WORK is touched but hidden names that begin
# with .WORK.NONCE, nothing is reached through a link below the work area, and no process is signalled that is not
# proven to be the job's.
#
# Only what a twenty years old userland has: sh, cat, chmod, date, dd, env, find, grep, mkdir, mv, rm, tail, tar, wc,
# xargs, what wrapper.sh needs, and /proc. sha256sum and rsync are used if they are there; for results sha256sum has to
# be there.

verb=$1
area=$2
work=$3
nonce=$4
token=$5
if [ "$#" -gt 5 ]; then shift 5; else set --; fi
umask 027
unset CDPATH

fatal() { # WORDS
    echo "$1" >&2
    exit 70
}
wait_for() { # WORDS
    echo "$1" >&2
    exit 75
}
broken() { # WORDS; what the system said comes before
    echo "$1" >&2
    exit 74
}
tell() { # NAME VALUE
    printf '%s %s\n' "$1" "$2"
}
is_there() { # NAME; a link to nowhere is there too
    [ -e "$1" ] || [ -L "$1" ]
}

# --- files -----------------------------------------------------------------------------------------------------------

enter_area() {
    cd -- "$area" 2>/dev/null || wait_for "the work area $area is not there: is it mounted?"
}

# Goes into the job's own directory, or fails if it is not there. What else has its name is left alone.
enter() {
    enter_area
    is_there "$work" || return 1
    { [ -d "$work" ] && [ ! -L "$work" ]; } || fatal "$area/$work is not a directory: move it away"
    cd "./$work" || broken "cannot look into $area/$work"
    text=
    [ ! -e nonce ] || slurp nonce
    [ "$text" = "$nonce" ] || fatal "$area/$work is not of this job ($nonce): move it away"
}

# Sets `text` to the content of a small file, without the end of its line; fails if it is not there.
slurp() { # NAME
    text=
    is_there "$1" || return 1
    { [ -f "$1" ] && [ ! -L "$1" ]; } || fatal "$area/$work/$1 is no plain file: look at the job by hand"
    more=
    {
        IFS= read -r text
        IFS= read -r more
        :
    } < "$1" || broken "cannot read $area/$work/$1"
    [ -z "$more" ] || text="$text $more"
    # A file server's trouble must not look like an empty file, which means something.
    if [ -z "$text" ] && [ -s "$1" ]; then text="(unreadable)"; fi
}

# Lets a small file appear whole.
write() { # NAME TEXT
    [ ! -d "$1" ] || fatal "$area/$work/$1 is a directory: look at the job by hand"
    { printf '%s' "$2" > ".$1.$token" && mv -f -- ".$1.$token" "$1"; } || broken "cannot write $1 in $area/$work"
}

# Takes the lock if it is free, and says whether.
claim() { # REASON
    if words=$(mkdir lock 2>&1); then
        write ended "$1
"
        tell claimed yes
    else
        is_there lock || broken "cannot make the lock in $area/$work: $words"
        tell claimed no
    fi
}

# Renames a directory of the work area; never into one that stands under the new name by now.
move() { # FROM TO
    is_there "$2" && return 1
    mv -T -- "$1" "$2" 2>/dev/null || { is_there "$1" && ! is_there "$2" && mv -- "$1" "$2"; }
}

# Removes a directory of the work area. Directories that a job left without the right to write are opened up.
remove() { # NAME
    is_there "$1" || return 0
    rm -rf -- "./$1" 2>/dev/null && return
    find "./$1" -type d ! -perm -0700 -exec chmod u+rwx '{}' ';'
    rm -rf -- "./$1" || broken "cannot remove $area/$1"
}

# A crash of the node must not leave files of the length 0. An old sync knows no files, but would wait for all disks.
flush() { # DIRECTORY
    if sync --help 2>/dev/null | grep -q -e --data; then
        find "./$1" -exec sync -- '{}' '+'
    else
        find "./$1" -type f -exec dd if=/dev/null 'of={}' conv=notrunc,fsync ';' 2>/dev/null
    fi
}

prepare() { # SIZE SHA256
    ! enter || return 0
    enter_area
    attempt=.$work.$nonce.new
    remove "$attempt"
    umask 022
    { mkdir -- "$attempt" && chmod 750 "$attempt" && cat > "$attempt/.files.tar"; } || broken "cannot write to $area"
    [ "$(wc -c < "$attempt/.files.tar")" -eq "$1" ] || wait_for "$work: its files did not arrive whole"
    if command -v sha256sum >/dev/null; then
        digest=$(sha256sum < "$attempt/.files.tar")
        [ "${digest%% *}" = "$2" ] || wait_for "$work: its files were damaged on their way"
    fi
    # The owner is the one who unpacks, and nobody's clock matters.
    ( cd "$attempt" && tar -xompf .files.tar && rm -f .files.tar ) || broken "cannot unpack the files of $work in $area"
    flush "$attempt"
    move "$attempt" "$work" || {
        remove "$attempt"
        is_there "$work" || broken "cannot make $area/$work"
    }
    enter || broken "cannot make $area/$work"
}

# --- processes -------------------------------------------------------------------------------------------------------

# Sets `start` to the start time of a process (clock ticks after boot), empty for a zombie: it is dead.
find_start() { # PID
    start=
    { read -r stat < "/proc/$1/stat"; } 2>/dev/null || return 1
    set -- ${stat##*") "}
    case $1 in Z | X | x) return 1 ;; esac
    start=${20}
}

is_alive() { # PID START BOOT
    case "$1$2" in '' | *[!0-9]*) return 1 ;; esac
    [ "$3" = "$boot" ] && find_start "$1" && [ "$start" = "$2" ]
}

# Sets `pids` and `number` to the living processes that carry the job's nonce. That none is found has to mean something.
find_carriers() {
    pids=
    number=0
    paths=$(grep -lzxF "STAGECAL_NONCE=$nonce" /proc/[0-9]*/environ 2>/dev/null)
    [ "$?" -le 2 ] || broken "grep cannot be run on the node"
    for path in $paths; do
        path=${path%/environ}
        pids="$pids ${path#/proc/}"
        number=$((number + 1))
    done
}

find_clock() {
    read -r boot < /proc/sys/kernel/random/boot_id && read -r uptime idle < /proc/uptime || broken "cannot read /proc"
}

# The order makes it true though everything moves: a wrapper makes the lock after `launched`, `pid` before `ended`, and
# `exit` last of all, so whatever is read here implies that what it follows from is read as well.
look() {
    find_clock
    tell boot "$boot"
    tell uptime "$uptime"
    if ! enter; then
        tell exists no
        find_carriers
        tell survivors "$number"
        return
    fi
    begun=
    if is_there lock; then begun=yes; tell locked yes; fi
    if slurp launched; then begun=yes; tell launched "$text"; fi
    slurp ended
    told=$text
    slurp exit
    code=$text
    alive=
    if slurp pid; then
        tell pid "$text"
        if [ -z "$code" ] && is_alive $text; then
            alive=yes
            tell alive yes
        fi
    fi
    if [ -z "$code" ]; then
        if [ -z "$alive" ] && [ -n "$begun" ]; then
            find_carriers
            tell survivors "$number"
        fi
        slurp exit
        code=$text
    fi
    if [ -n "$code" ]; then
        slurp ended
        told=$text
        tell exit "$code"
    fi
    tell ended "$told"
    # The directory must not have gone while it was looked at.
    slurp nonce && [ "$text" = "$nonce" ] || wait_for "$area/$work changed while it was looked at"
}

launch() { # LEASE NAMES COMMAND...
    enter || fatal "$area/$work is not there: prepare the job before it is launched"
    ! is_there lock || return 0
    find_clock
    write lease "$1
"
    write launched "$uptime $boot
"
    names=$2
    shift 2
    for name in $names; do
        eval "[ -z \"\${$name+set}\" ] || set -- \"$name=\$$name\" \"\$@\""
    done
    env -i "STAGECAL_NONCE=$nonce" "$@" </dev/null >/dev/null 2>&1 ||
        wait_for "$work: the shell could not start its wrapper (too many processes?)"
}

terminate() { # PID START BOOT
    find_clock
    if is_alive "$@"; then
        kill -s TERM "$1"
        kill -s CONT "$1"
    fi 2>/dev/null
    return 0
}

kill_carriers() {
    find_carriers
    for pid in $pids; do
        grep -qzxF "STAGECAL_NONCE=$nonce" "/proc/$pid/environ" && kill -s KILL "$pid"
    done 2>/dev/null
    return 0
}

# One look after the other without a single new process; a work area that hangs keeps the answer back, as it should.
loads() {
    cores=$(grep -c '^processor' /proc/cpuinfo)
    [ "${cores:-0}" -gt 0 ] || cores=$(nproc)
    seconds=
    while read -r question; do
        if [ ! -d "$area" ]; then
            echo "the work area $area is not there: is it mounted?"
        elif ! read -r load rest < /proc/loadavg || ! read -r uptime rest < /proc/uptime; then
            echo "/proc cannot be read"
        else
            uptime=${uptime%%.*}
            # A process for each answer would cost more than the answer: in between the time goes on as the uptime does.
            if [ -z "$seconds" ] || [ $((uptime - asked)) -ge 30 ]; then
                asked=$uptime
                seconds=$(date +%s)
            fi
            case $seconds in
                '' | *[!0-9]*) seconds=; echo "it cannot tell its time: date cannot be run" ;;
                *) echo "$load ${cores:-1} $((seconds + uptime - asked))" ;;
            esac
        fi
    done
}

# --- results ---------------------------------------------------------------------------------------------------------

list() {
    enter || fatal "$area/$work is gone: there are no results"
    set -- $(rsync --version 2>/dev/null)
    tell rsync "$3"
    set --
    for name in products auxiliary job.json report.json; do
        ! is_there "$name" || set -- "$@" "$name"
    done
    [ "$#" -eq 0 ] || find "$@" \
        -type f -printf 'f %s %p\0' -o -type d -printf 'd 0 %p\0' -o -printf 'x 0 %p\0' ||
        broken "cannot list the results in $area/$work"
}

# --- what jobs need of a node ----------------------------------------------------------------------------------------

finding() { # NAME yes|no WORDS
    printf '%s\t%s\t%s\n' "$1" "$2" "$3"
}

# Two programs of this node want the same lock. Whether two nodes exclude each other cannot be tried from one of them.
try_flock() {
    file=.flock.$token
    trap 'rm -f "$file"' EXIT
    program='
import fcntl, os, sys
first = open(sys.argv[1], "w")
fcntl.flock(first, 6)
pid = os.fork()
if pid == 0:
    second = open(sys.argv[1], "w")
    try:
        fcntl.flock(second, 6)
    except (IOError, OSError):
        os._exit(3)
    os._exit(4)
os._exit(os.waitpid(pid, 0)[1] // 256)
'
    tool=
    for tool in flock python3 python perl ''; do
        [ -z "$tool" ] || ! command -v "$tool" >/dev/null || break
    done
    case $tool in
        flock) words=$( { flock -n 9 && { flock -n "$file" true; [ "$?" -eq 1 ] && exit 3 || exit 4; }; } 2>&1 9>"$file") ;;
        python*) words=$("$tool" -c "$program" "$file" 2>&1) ;;
        perl)
            words=$(perl -e 'use Fcntl ":flock"; open(A, ">", $ARGV[0]) && flock(A, LOCK_EX|LOCK_NB) || die "$!\n";
                if (!($p = fork)) { open(B, ">", $ARGV[0]); exit(flock(B, LOCK_EX|LOCK_NB) ? 4 : 3) }
                waitpid($p, 0); exit($? >> 8)' "$file" 2>&1)
            ;;
        *)
            finding flock no "cannot be tried: neither flock, nor python, nor perl is there"
            return
            ;;
    esac
    case $? in
        3) finding flock yes "excludes in $area (tried with $tool, on this node alone)" ;;
        4) finding flock no "two programs hold the same lock in $area at once: measurement sets would be damaged" ;;
        *) finding flock no "does not work in $area: $(echo $words)" ;;
    esac
}

try_worker() { # PYTHON
    program='import importlib.util as u, sys; sys.exit(0 if u.find_spec("casatasks") else "it has no casatasks")'
    if [ ! -f "$1" ] || [ ! -x "$1" ]; then
        finding worker no "there is no program $1: see [restore] casa_worker"
    elif words=$("$1" -E -s -c "$program" 2>&1 </dev/null); then
        finding worker yes "$1 has casatasks"
    else
        finding worker no "$1: $(printf '%s' "$words" | tail -n 1)"
    fi
}

check() { # KIB PYTHON [CASA_HOME ...]
    reserve=$1
    worker=$2
    shift 2
    finding shell yes "a POSIX shell answers"
    missing=
    for tool in cat chmod date dd env find grep mkdir mv rm setsid sha256sum sleep tail tar wc xargs; do
        command -v "$tool" >/dev/null || missing="$missing $tool"
    done
    if [ -n "$missing" ]; then finding tools no "missing:$missing"; else finding tools yes "all there, tar too"; fi
    if command -v rsync >/dev/null; then
        finding rsync yes "there"
    else
        finding rsync yes "not there: results come by tar, file after file"
    fi
    if ! cd -- "$area" 2>/dev/null; then
        finding area no "the work area $area is not there: is it mounted?"
    elif ! { mkdir ".check.$token" && rm -r ".check.$token"; } 2>/dev/null; then
        finding area no "cannot write to the work area $area"
    else
        free=$(df -P -k . | { read -r head; read -r device blocks used free rest; echo "$free"; })
        words="$area, free: $((${free:-0} / 1048576)) GiB"
        if [ "${free:-0}" -ge "$reserve" ]; then
            finding area yes "$words"
        else
            finding area no "$words, less than reserve_gb ($((reserve / 1048576)) GiB): delete or enlarge"
        fi
        try_flock
    fi
    [ "$worker" = - ] || try_worker "$worker"
    for home; do
        if [ -x "$home/bin/casa" ]; then
            finding casa yes "$home"
        else
            finding casa no "there is no $home/bin/casa"
        fi
    done
}

# A job gets the language of its node; the words of the system that we read are always the same.
[ "$verb" = launch ] || { LC_ALL=C; export LC_ALL; }

case $verb in
    loads) loads ;;
    prepare) prepare "$@" ;;
    launch) launch "$@" ;;
    look) look ;;
    rule)
        enter || fatal "$area/$work is gone"
        claim "$1"
        ;;
    lease)
        enter || fatal "$area/$work is gone: the job cannot be kept alive, cancel it"
        write lease "$1
"
        ;;
    cancel)
        enter || wait_for "$area/$work was removed while the job was being cancelled"
        write cancel ''
        claim cancelled
        ;;
    terminate) terminate "$@" ;;
    kill) kill_carriers ;;
    output)
        enter || exit 0
        is_there output || exit 0
        { [ -f output ] && [ ! -L output ]; } || fatal "$area/$work/output is no plain file: look at the job by hand"
        tail -c "$1" output || broken "cannot read the output in $area/$work"
        ;;
    remove)
        enter_area
        remove ".$work.$nonce.removed"
        enter || exit 0
        enter_area
        move "$work" ".$work.$nonce.removed" || broken "cannot move $area/$work"
        remove ".$work.$nonce.removed"
        ;;
    list) list ;;
    digest)
        enter || fatal "$area/$work is gone: there are no results"
        xargs -0 sha256sum -- || broken "cannot read the results in $area/$work"
        ;;
    send)
        enter || fatal "$area/$work is gone: there are no results"
        tar -cf - --no-recursion --null -T - || broken "cannot read the results in $area/$work"
        ;;
    clock) date +%s ;;
    check) check "$@" ;;
    *) fatal "node.sh: there is no verb $verb" ;;
esac
