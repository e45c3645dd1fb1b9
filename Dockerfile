# Python and packages for GPU nodes. slurm/README.md says how to build and use it. Linted, never built.
FROM python:3.11-slim-bookworm

# a compiler for what torch.compile and Triton build at run time; torch's wheel brings CUDA's libraries, the node a driver
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

# for another build of torch: docker build --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL

WORKDIR /opt/mvptr_ds
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch==2.13.0
COPY pyproject.toml setup.py ./
COPY mvptr_ds mvptr_ds
COPY ds_configs ds_configs
RUN pip install --no-cache-dir -c constraints.txt ".[remote,tensorboard]"

RUN useradd --create-home --uid 1000 mvptr && install -d -o mvptr -g mvptr /workspace
ENV PYTHONNOUSERSITE=1
USER 1000
WORKDIR /workspace
CMD ["python", "-m", "mvptr_ds.train", "--help"]
