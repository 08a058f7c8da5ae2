#!/bin/sh -e
# Options such as --dry-run come behind the name of this script.
python -m launch.pod watch --name llama-229m-ire --zone "${ZONE:?a zone of Google Cloud}" --accelerator v6e-64 --tier "${TIER:-spot}" ${ALLOW_DIRTY:-} "$@" -- jaxlab train configs/llama_229m_ire.yaml --out "${RUNS:?the folder of runs, as the workers see it}/llama_229m_ire" --set stages.warmup.batch_size=512
