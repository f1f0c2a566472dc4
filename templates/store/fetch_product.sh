#!/bin/sh
# fetch_product.sh FILE_ID: copies an archived file of a MOUS from the store into the current directory.
#
# The store is the directory of this script, with the files of each MOUS in products/<MOUS>/. One appears here under its
# name in the archive, whole or not at all. A file that is not there is first made by the program "make" of the store,
# if it has one (called as: make FILE_ID). Exit code 1 with a message on stderr if the file is unknown or cannot be
# copied.
set -eu

fail() {
    printf 'fetch_product.sh: %s\n' "$1" >&2
    exit 1
}

find_in_store() {
    for found in "$store"/products/*/"$name"; do
        [ ! -f "$found" ] || return 0
    done
    return 1
}

[ $# -eq 1 ] || fail 'give one argument: the name of an archived file'
name=$1
# A name that consists of nothing else, and begins so, cannot lead out of the store.
case $name in
    [!A-Za-z0-9]* | *[!A-Za-z0-9_.+-]* | '') fail "not the name of an archived file: $name" ;;
esac

store=$(cd "$(dirname "$0")" && pwd)
[ ! -e "$name" ] || fail "$name is already in the current directory"
if ! find_in_store && [ -x "$store/make" ]; then
    "$store/make" "$name" || fail "$name could not be made"
fi
find_in_store || fail "the store has no file $name"

partial=.$name.$$
trap 'rm -f "$partial"' EXIT
trap 'exit 1' HUP INT TERM
cp "$found" "$partial" || fail "$name could not be copied"
mv "$partial" "$name"
