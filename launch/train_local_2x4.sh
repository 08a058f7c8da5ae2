#!/bin/sh -e
# Options such as --dry-run come behind the name of this script.
python -m launch.pod local --processes 2 --devices 4 "$@" -- jaxlab train configs/demo.yaml --out "${RUNS:?the folder of runs}/demo" --set mesh.fsdp=8
