#!/bin/sh
# Unpacks Debian's Python for 64-bit ARM into a folder, for qemu-aarch64-static -L FOLDER: arm64_root.sh FOLDER.
# As root, on Debian; needs debootstrap.  Nothing of it is configured or started.
set -e
folder=${1:?usage: arm64_root.sh FOLDER}
mkdir -p "$folder"
debootstrap --arch=arm64 --variant=minbase --include=python3 --download-only bookworm "$folder" > "$folder.log"
# by themselves, and not by debootstrap: that would want to run ARM programs
for package in "$folder"/var/cache/apt/archives/*.deb; do
  dpkg-deb -x "$package" "$folder"
done
ls "$folder"/usr/bin/python3.*
