#!/bin/sh
# find_python.sh [PYTHON]: prints the path of a Python that can make the environment, having checked
# what else the environment needs. Else prints one line, what is missing and its remedy: exit code 2.

missing() { echo "$1"; exit 2; }

compiler=${CXX:-}
for name in g++ clang++ c++; do
    [ -n "$compiler" ] || compiler=$(command -v "$name")
done
[ -n "$compiler" ] || missing "no C++ compiler (g++ or clang++): install one, e.g. apt-get install g++"
command -v "${compiler%% *}" >/dev/null || missing "no such C++ compiler: CXX=$compiler; set CXX to g++ or clang++"

old=
bare=
for name in ${1:-python3 python3.11 python3.12 python3.13 python3.14 python3.15}; do
    path=$(command -v "$name") && version=$("$path" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
    if ! "$path" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        old="$old $name is $version;"
    elif ! "$path" -c 'import ensurepip, venv' 2>/dev/null; then
        bare=$name
    else
        echo "$path"
        exit 0
    fi
done
[ -z "$bare" ] || missing "$bare has no venv module: install it, e.g. apt-get install $("$bare" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
missing "no Python 3.11 or newer (${old:-${1:-python3} is not there;} looked for ${1:-python3, python3.11 to python3.15}): install one, or say where it is with PYTHON=/path/to/python3"
