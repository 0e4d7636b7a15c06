"""Environment variables for libtpu on a machine without a TPU."""

# Without these libtpu asks the network for its place and warns of missing hosts.
ABSENT = {
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # for every target
}
