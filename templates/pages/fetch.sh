#!/bin/sh
# Fetches the calibrated data of one ALMA MOUS and verifies every file. Needs curl or wget, and nothing else.
#
#     sh fetch.sh [-d DIRECTORY] [URL]
#
# Without -d the files go into a directory of their own, named after the MOUS. After any interruption just run it
# again: what is complete is left alone, what is not is continued (NAME.part). Nothing that is fetched is ever run.
# Exit code: 0 if every file is there and matches its checksum, 1 if not, 2 for a wrong argument.
# FETCH_TRIES and FETCH_PAUSE (seconds) in the environment say how often a silent server is asked, and the first pause.

set -u
LC_ALL=C
export LC_ALL

say() {
    printf '%s\n' "$*"
}

usage() {
    say "usage: sh fetch.sh [-d DIRECTORY] [URL]" >&2
    say "example: sh fetch.sh -d /data/alma" >&2
    exit 2
}

stop() {
    say "FAILED: $*"
    exit 1
}

size_of() {
    if [ -f "$1" ]; then
        # shellcheck disable=SC2012 # Sizes of files whose names we checked; stat differs between systems.
        ls -ln "$1" | { read -r _ _ _ _ bytes _ && say "$bytes"; }
    else
        say 0
    fi
}

digest_of() {
    case $digester in
    sha256sum) sha256sum <"$1" ;;
    shasum) shasum -a 256 <"$1" ;;
    openssl) openssl dgst -sha256 -r <"$1" ;;
    esac | sed 's/[^0-9a-f].*//'
}

# is_right FILE SHA256: is this the file? The list itself has no checksum: it must look like one, else it is not
# the list but, say, the login page of a network.
is_right() {
    [ -f "$1" ] || return 1
    if [ "$2" = list ]; then
        [ -s "$1" ] && ! grep -qv '^[0-9a-f]\{64\}  [A-Za-z0-9_][A-Za-z0-9._+-]*$' "$1"
    else
        [ "$(digest_of "$1")" = "$2" ]
    fi
}

# get URL FILE: fetch, or continue, as curl or wget does it. A connection that is silent for a minute has ended.
get() {
    # shellcheck disable=SC2086 # The meter and the limits are words, or none.
    case $tool in
    curl)
        curl --fail --location --globoff --connect-timeout 60 --speed-limit 1 --speed-time 60 $meter \
            --continue-at - --output "$2" "$1"
        ;;
    wget) wget $meter $limits -c -O "$2" "$1" ;;
    esac </dev/null
}

# answer_of URL: the status code (200, 404, ...) that the server gives for this file, or nothing if it is silent.
answer_of() {
    # shellcheck disable=SC2086
    case $tool in
    curl)
        curl --silent --head --location --globoff --connect-timeout 60 --max-time 60 \
            --output /dev/null --write-out 'HTTP/ %{http_code}\n' "$1"
        ;;
    wget) wget -S --spider $limits "$1" 2>&1 ;;
    esac </dev/null | sed -n 's|.*HTTP/[0-9.]* \([1-9][0-9][0-9]\).*|\1|p' | tail -n 1
}

# refused STATUS: did the tool say that the server answered, but not with the rest of the file?
refused() {
    case $tool:$1 in
    curl:22 | curl:33 | curl:36) return 0 ;;
    esac
    # wget does not tell; after three attempts in vain with a server that answers we conclude it.
    [ "$in_vain" -ge 3 ]
}

# fetch NAME SHA256: returns 0 if NAME is there and right, 1 if it cannot be had, 2 if nothing can be had now.
fetch() {
    part=$1.part
    best=$(size_of "$part")
    in_vain=0
    pause=$first_pause
    anew=no
    while :; do
        before=$(size_of "$part")
        get "$url/$1" "$part"
        status=$?
        after=$(size_of "$part")
        if [ "$status" -eq 0 ]; then
            if is_right "$part" "$2"; then
                mv -f "$part" "$1" && return 0
                say "$1: FAILED: it cannot be written here"
                return 2
            fi
            rm -f "$part"
            if [ "$anew" = yes ]; then
                say "$1: FAILED: its checksum is wrong, although it was fetched anew"
                return 1
            fi
            say "$1: its checksum is wrong, fetching it anew"
            anew=yes
            continue
        fi
        [ "$after" -gt 0 ] || rm -f "$part"
        case $tool:$status in
        curl:23 | wget:3)
            say "$1: FAILED: it cannot be written here (is the disk full?)"
            return 2
            ;;
        esac
        answer=$(answer_of "$url/$1")
        case $answer in
        401 | 403 | 404 | 410)
            say "$1: FAILED: the server answers $answer: it is not there, or not any more"
            return 1
            ;;
        esac
        if [ "$after" -gt "$best" ]; then
            best=$after
            in_vain=0
            pause=$first_pause
        else
            in_vain=$((in_vain + 1))
        fi
        if [ "$in_vain" -ge "$tries" ]; then
            say "$1: FAILED: no progress in $tries attempts"
            return 2
        fi
        if [ "$after" -gt 0 ] && [ "$after" -le "$before" ] && [ "${answer:-0}" = 200 ] && refused "$status"; then
            # Either all of it was here already, or the server cannot continue files, or the beginning is not ours.
            if is_right "$part" "$2"; then
                mv -f "$part" "$1" && return 0
            fi
            say "$1: cannot be continued, fetching it from its beginning"
            rm -f "$part"
            continue
        fi
        say "$1: interrupted after $after bytes, going on in $pause s"
        sleep "$pause"
        pause=$((pause * 2))
        [ "$pause" -le 300 ] || pause=300
    done
}

# have NAME SHA256: as fetch, and says one line about the outcome.
have() {
    if is_right "$1" "$2"; then
        say "$1: verified (it was here already)"
        return 0
    fi
    if [ -e "$1" ] && [ ! -f "$1" ]; then
        say "$1: FAILED: something else of this name is in the way"
        return 1
    fi
    # What another tool began under the final name is continued.
    if [ -f "$1" ] && [ ! -e "$1.part" ]; then
        mv -f "$1" "$1.part"
    fi
    say "$1: fetching"
    fetch "$1" "$2" || return
    say "$1: verified"
}

main() {
    url={{ url | shell_quote }}
    mous={{ mous | shell_quote }}
    ticket={{ ticket | shell_quote }}
    directory=
    while [ $# -gt 0 ]; do
        case $1 in
        -d)
            if [ $# -lt 2 ] || [ -z "$2" ]; then usage; fi
            directory=$2
            shift
            ;;
        http://* | https://*) url=$1 ;;
        *) usage ;;
        esac
        shift
    done
    url=${url%/}
    # A ticket may have several deliveries, and their README.txt must not meet.
    [ -n "$directory" ] || directory=${mous}_$(printf '%.6s' "${url##*/}")
    tries=${FETCH_TRIES:-10}
    first_pause=${FETCH_PAUSE:-5}
    meter=
    limits=

    for tool in curl wget none; do
        command -v "$tool" >/dev/null 2>&1 && break
    done
    for digester in sha256sum shasum openssl none; do
        command -v "$digester" >/dev/null 2>&1 && break
    done
    [ "$tool" != none ] || stop "neither curl nor wget is installed here"
    [ "$digester" != none ] || stop "none of sha256sum, shasum and openssl is installed here"
    case $tool in
    curl) if [ -t 2 ]; then meter=--progress-bar; else meter=-sS; fi ;;
    wget)
        if [ ! -t 2 ]; then meter=-q; fi
        # The wget of BusyBox has no such limits, or crashes by them.
        if wget --help 2>&1 | grep -q -e '--tries'; then limits='-t 1 -T 60'; fi
        ;;
    esac

    { mkdir -p -- "$directory" && CDPATH='' cd -- "$directory"; } || stop "the directory $directory cannot be used"
    trap 'say ""; say "Interrupted: run it again, it goes on where it stopped."; exit 130' INT

    rm -f SHA256SUMS.part
    fetch SHA256SUMS list || stop "the list of files cannot be fetched from $url"

    total=0
    verified=0
    reachable=yes
    while read -r sum name; do
        total=$((total + 1))
        [ "$reachable" = yes ] || continue
        have "$name" "$sum"
        case $? in
        0) verified=$((verified + 1)) ;;
        2) reachable=no ;;
        esac
    done <SHA256SUMS

    if [ "$verified" -eq "$total" ]; then
        say "All $total files are in $directory and match their checksums."
        exit 0
    fi
    say "Run it again: it goes on where it stopped. If that does not help, ask the ALMA helpdesk (ticket $ticket)."
    stop "$verified of $total files are in $directory and match their checksums, the others do not"
}

# The last line runs everything: a script that was cut on its way does nothing.
main "$@"
