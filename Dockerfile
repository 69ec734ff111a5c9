# The GPU image. Build: `make docker`. Train, with the host's data and runs mounted:
#
#   docker run --rm --gpus all --ipc=host -v "$PWD/data:/opt/moefoundry/data" -v "$PWD/runs:/opt/moefoundry/runs" \
#       moefoundry composer -n 8 scripts/train.py configs/quickstart.yaml
#
# (--ipc=host: NCCL and the data loader's workers share memory, and Docker's default of 64 MiB is too little.)
#
# CUDA 13.0 is what the locked torch is built for; the devel image has the headers and nvcc, for kernels compiled
# on the spot. Its Python is 3.12: every pin of requirements.lock has a wheel for it as well as for 3.11.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

# Triton and torch.compile build small C modules at run time: hence the compiler and Python's headers.
# tini is PID 1, so that a preemption's SIGTERM reaches the launcher and dead ranks are reaped.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        build-essential \
        python3 \
        python3-dev \
        python3-venv \
        tini \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv
RUN python3 -m venv "$VIRTUAL_ENV"
ENV PATH="$VIRTUAL_ENV/bin:$PATH"

WORKDIR /opt/moefoundry

# The dependencies come before the sources: a change of code reuses this layer of several gigabytes.
# --no-deps: the lock is complete, and two of its packages cap torch without need.
COPY requirements.lock ./
RUN pip install --no-cache-dir --no-deps -r requirements.lock

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation . \
    && rm -rf build src/*.egg-info

# The sources stay root's; a run writes only to data and runs. The user is a number, so that a cluster can tell that it
# is not root.
RUN useradd --no-log-init --create-home --uid 10001 moefoundry \
    && mkdir -p data runs \
    && chown moefoundry:moefoundry data runs
USER 10001

ENTRYPOINT ["tini", "--"]
CMD ["moefoundry", "--help"]
