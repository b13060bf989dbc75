#!/bin/bash
# Print the first interpreter that is new enough and can make a virtual environment; nothing when there is none.
for name in python3 python3.11 python3.12 python3.13; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        command -v "$name"
        exit 0
    fi
done
