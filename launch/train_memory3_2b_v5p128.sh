#!/bin/sh -e
# Options such as --dry-run come behind the name of this script.
python -m launch.pod watch --name memory3-2b --zone "${ZONE:?}" --accelerator v5p-128 --tier "${TIER:-spot}" ${ALLOW_DIRTY:-} "$@" -- jaxlab train configs/memory3_2b.yaml --out "${RUNS:?}/memory3_2b"
