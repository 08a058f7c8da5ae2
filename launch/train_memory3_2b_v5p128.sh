#!/bin/sh -e
# Options such as --dry-run come behind the name of this script.
python -m launch.pod watch --name memory3-2b --zone "${ZONE:?a zone of Google Cloud}" --accelerator v5p-128 --tier "${TIER:-spot}" ${ALLOW_DIRTY:-} "$@" -- jaxlab train configs/memory3_2b.yaml --out "${RUNS:?the folder of runs, as the workers see it}/memory3_2b" --set data.source="${DATA:?the text, a path as the workers see it}" tokenizer.path="${TOKENIZER:?the file of a tokenizer, as the workers see it}"
