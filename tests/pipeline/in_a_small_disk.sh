#!/bin/sh
# In a namespace of its own, on a disk of so many kilobytes: run the command, which fills it; make room; run it again.
# usage: unshare -Urm in_a_small_disk.sh FOLDER KILOBYTES OUT COMMAND...
set -u
folder=$1; kilobytes=$2; out=$3
shift 3
mount -t tmpfs -o "size=${kilobytes}k" none "$folder" || exit 77
"$@" > "$out/first.log" 2>&1
echo $? > "$out/first.code"
mount -o remount,size=400m "$folder"
"$@" > "$out/second.log" 2>&1
echo $? > "$out/second.code"
mount -o remount,ro "$folder"
"$@" > "$out/third.log" 2>&1
echo $? > "$out/third.code"
cp -r "$folder/run" "$out/run"
