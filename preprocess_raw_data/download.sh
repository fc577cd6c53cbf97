#!/usr/bin/env bash
# Fetches the tars that a list names; the same command goes on where it was interrupted:
#   preprocess_raw_data/download.sh RAW_DIR [LIST]
# LIST (else $TAR_LIST): a file or an address with one tar's address a line and, where its sum is known, a blank and
# sha-256=DIGEST behind it. A tar appears in RAW_DIR once it is whole; RAW_DIR/.downloading holds the others.
# $ARIA2C_OPTIONS goes to aria2c.
set -euo pipefail

# Shows no name and password of a host.
hide() {
    sed -u -E -e 's#://[^[:space:]]*@#://***@#g' -e 's#(^|[[:space:]'"'"'])[^[:space:]:/@]+:[^[:space:]/@]+@#\1***@#g'
}

fail() {
    echo "error: $2" | hide >&2
    exit "$1"
}

raw_dir=${1:-} list=${2:-${TAR_LIST:-}}
if [ $# -gt 2 ] || [ -z "$raw_dir" ] || [ -z "$list" ]; then
    fail 2 "RAW_DIR and LIST: both are needed: preprocess_raw_data/download.sh data/raw urls.txt"
fi
if ! type aria2c >/dev/null 2>&1; then
    fail 1 "aria2c: no such program: install the package aria2 (apt, dnf, conda-forge, Homebrew), then run this again"
fi
partial=$raw_dir/.downloading
mkdir -p "$partial"
read -r -a options <<<"${ARIA2C_OPTIONS:-}"

# Usage: fetch FOLDER NAME ADDRESS [OPTIONS]. No name or other file that a server proposes is taken.
fetch() {
    aria2c --dir="$1" --out="$2" --file-allocation=none --auto-file-renaming=false --allow-overwrite=true \
        --follow-torrent=false --follow-metalink=false --max-connection-per-server=4 --max-tries=5 --retry-wait=5 \
        --console-log-level=warn --summary-interval=30 ${options[@]+"${options[@]}"} "${@:4}" -- "$3" </dev/null 2>&1 | hide >&2
}
trap 'exit 130' INT # aria2c answers it by itself, and the next tar would begin

if [[ $list =~ ^(https?|ftp):// ]]; then
    fetch "$partial" list.txt "$list" --continue=false || fail 1 "$list: the list cannot be fetched: correct its address"
    list=$partial/list.txt
fi
[ -r "$list" ] || fail 1 "$list: no such list, or it cannot be read: correct the path"

num_tars=0 num_failed=0
while read -r address sum || [ -n "$address" ]; do
    case $address in '' | '#'*) continue ;; esac
    name=${address##*/}
    name=${name%%[?#]*}
    if [[ ! $address =~ ^(https?|ftp):// || ! $name =~ ^[0-9]+\.tar$ || ! $sum =~ ^(sha-256=[0-9a-fA-F]{64})?$ ]]; then
        fail 1 "$list: '$address $sum' is no address of a NNNN.tar with nothing or sha-256=DIGEST behind it: correct it"
    fi
    num_tars=$((num_tars + 1))
    if [ -e "$raw_dir/$name" ]; then continue; fi
    check=(${sum:+--checksum="$sum"})
    code=0
    fetch "$partial" "$name" "$address" --continue=true ${check[@]+"${check[@]}"} || code=$?
    if [ "$code" = 0 ]; then
        mv "$partial/$name" "$raw_dir/$name"
        echo "$raw_dir/$name"
    else
        num_failed=$((num_failed + 1))
        echo "$name: aria2c ended with $code" >&2
        if [ "$code" = 32 ]; then rm -f "$partial/$name"; fi # another sum: begun anew the next time
    fi
done < <(tr -d '\r' <"$list")
[ "$num_tars" -gt 0 ] || fail 1 "$list: names no tar: correct it"
[ "$num_failed" = 0 ] || fail 1 "$num_failed of $num_tars tars are not here yet: run this again"
echo "$num_tars tars are here" >&2
