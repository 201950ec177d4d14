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

# Run by whatever calls itself python: prints what is wrong with it and exits with 3.
check='
import os, sys
version = "%d.%d" % sys.version_info[:2]
def unfit(problem):
    print(problem)
    sys.exit(3)
if sys.version_info < (3, 11):
    unfit("is " + version)
try:
    import ensurepip, venv
except ImportError:
    unfit("has no venv module (apt-get install python%s-venv)" % version)
import sysconfig
if sys.version_info >= (3, 14) and not os.path.exists(sysconfig.get_path("include") + "/Python.h"):
    # a pinned package has no ready build for it yet
    unfit("has no Python.h (apt-get install python%s-dev)" % version)
'
found=
for name in ${1:-python3 python3.13 python3.12 python3.11 python3.14 python3.15}; do
    path=$(command -v "$name") || continue
    problem=$("$path" -c "$check" 2>/dev/null)
    case $? in
        0) echo "$path"; exit 0 ;;
        3) found="$found$name $problem; " ;;
    esac
done
missing "no Python 3.11 or newer that can be used: ${found:-${1:-python3} is not there; }install one, or name one with PYTHON=/path/to/python3"
