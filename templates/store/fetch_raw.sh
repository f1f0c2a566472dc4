#!/bin/sh
# fetch_raw.sh EB_UID: copies the raw data (ASDM) of an execution block from the store into the current directory.
#
# The store is the directory of this script, with the ASDMs in raw/ (uid___A002_X..._X...). One appears here under that
# name, whole or not at all, as asdmExportLight leaves it. Both forms of a UID are taken. An EB that is not there is
# first made by the program "make" of the store, if it has one (called as: make uid___A002_X..._X...).
# Exit code 1 with a message on stderr if the EB is unknown or cannot be copied.
set -eu

fail() {
    printf 'fetch_raw.sh: %s\n' "$1" >&2
    exit 1
}

[ $# -eq 1 ] || fail 'give one argument: the UID of an execution block'
case $1 in
    uid://A00?/X*/X*) execution_block=$(printf '%s' "$1" | tr ':/' '__') ;;
    uid___A00?_X*_X*) execution_block=$1 ;;
    *) fail "not a UID of an execution block: $1" ;;
esac
# A name that consists of nothing else cannot lead out of the store.
case $execution_block in
    *[!A-Za-z0-9_]*) fail "not a UID of an execution block: $1" ;;
esac

store=$(cd "$(dirname "$0")" && pwd)
[ ! -e "$execution_block" ] || fail "$execution_block is already in the current directory"
if [ ! -d "$store/raw/$execution_block" ] && [ -x "$store/make" ]; then
    "$store/make" "$execution_block" || fail "$execution_block could not be made"
fi
[ -d "$store/raw/$execution_block" ] || fail "the store has no execution block $execution_block"

partial=.$execution_block.$$
trap 'rm -rf "$partial"' EXIT
trap 'exit 1' HUP INT TERM
cp -R "$store/raw/$execution_block" "$partial" || fail "$execution_block could not be copied"
mv "$partial" "$execution_block"
