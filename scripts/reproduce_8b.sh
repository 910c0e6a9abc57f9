#!/bin/sh
exec "${PYTHON:-python3}" "$(dirname "$0")/reproduce_8b.py" "$@"
