#!/bin/sh
# Builds Debian's Python with musl into a folder, in a few minutes: musl_python.sh FOLDER.
# As root, on Debian 12; needs gcc, make, and: apt-get install musl musl-tools tcl.
set -e
folder=${1:?usage: musl_python.sh FOLDER}
mkdir -p "$folder/source/lists/partial"
folder=$(cd "$folder" && pwd)
cd "$folder/source"
log=$folder/log

# sources, without a change to this machine's lists of packages
echo "deb-src http://deb.debian.org/debian bookworm main" > list
echo "deb http://deb.debian.org/debian trixie main" >> list
apt() {
  apt-get -q -o Dir::Etc::SourceList="$PWD/list" -o Dir::Etc::SourceParts=/dev/null -o Dir::State::lists="$PWD/lists" \
    -o APT::Sandbox::User=root "$@" >> "$log" 2>&1
}
apt update
apt download musl/trixie
apt source --download-only libffi zlib sqlite3 python3.11
for package in libffi zlib sqlite3 python3.11; do
  mkdir -p "$package"
  tar -xf "$package"_*.orig.tar.* -C "$package" --strip-components=1
done

# Python runs with a newer musl than bookworm's, 1.2.3, which cannot load numpy's wheels (they have RELR relocations)
dpkg-deb -x musl_*.deb musl
mkdir -p "$folder/lib"
cp musl/usr/lib/x86_64-linux-musl/libc.so "$folder/lib/ld-musl-x86_64.so.1"

# the kernel's headers, which musl-gcc does not look for
mkdir -p kernel
ln -sfn /usr/include/linux kernel/linux
ln -sfn /usr/include/asm-generic kernel/asm-generic
ln -sfn "/usr/include/$(gcc -dumpmachine)/asm" kernel/asm

# What llama_cpp and its requirements import of Python wants these three, linked in statically.
export CC=musl-gcc CFLAGS="-O1 -fPIC -idirafter $PWD/kernel"
(cd libffi && ./configure --prefix="$folder" --disable-shared --disable-docs && make install) >> "$log" 2>&1
(cd zlib && ./configure --prefix="$folder" --static && make install) >> "$log" 2>&1
# one file, which its own tools put together on this machine
(cd sqlite3 && CC=gcc ./configure --disable-tcl --disable-readline && make sqlite3.c) >> "$log" 2>&1
(cd sqlite3 && $CC $CFLAGS -DSQLITE_OMIT_LOAD_EXTENSION -c sqlite3.c && ar rcs "$folder/lib/libsqlite3.a" sqlite3.o &&
  cp sqlite3.h "$folder/include") >> "$log" 2>&1

export PKG_CONFIG_LIBDIR="$folder/lib/pkgconfig" CPPFLAGS="-I$folder/include" LDFLAGS="-L$folder/lib"
LDFLAGS="$LDFLAGS -Wl,--dynamic-linker=$folder/lib/ld-musl-x86_64.so.1"
export LIBSQLITE3_CFLAGS="-I$folder/include" LIBSQLITE3_LIBS="-lsqlite3 -lm"
# musl-gcc answers this question as gcc does; a compiler of a system with musl says nothing
sed -i 's/\$(\$CC --print-multiarch 2>\/dev\/null)/""/' python3.11/configure
# folders of this machine's own libraries and headers
sed -i 's/self.add_multiarch_paths()/pass/; s/if not CROSS_COMPILING:/if False:/' python3.11/setup.py
(cd python3.11 && ./configure --prefix="$folder" --without-ensurepip --disable-test-modules &&
  make -j2 && make install) >> "$log" 2>&1
"$folder/bin/python3.11" -c "import ctypes, sqlite3, zlib"
ls "$folder"/bin/python3.11
