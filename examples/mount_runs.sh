#!/bin/bash -e
# For launch.pod create and watch, --startup-script: mounts what all workers share as /mnt/runs.
# Copy it and write the address of your Filestore or other NFS server into it.
SHARE=10.0.0.2:/runs
mountpoint -q /mnt/runs && exit
apt-get install -y nfs-common
mkdir -p /mnt/runs
mount -t nfs "$SHARE" /mnt/runs
# A startup script is root, and the run is not.
chmod 777 /mnt/runs
# A bucket with a hierarchical namespace, in place of the share, once gcsfuse is installed:
# gcsfuse -o allow_other --file-mode=777 --dir-mode=777 BUCKET /mnt/runs
