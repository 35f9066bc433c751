# A container for `owl2 serve` and all other commands; docs/serving.md describes how to run it.
#
#   docker build --tag owl2 .                                   # for CPUs
#   docker build --tag owl2:cuda --build-arg DEVICE=cuda .      # for NVIDIA's GPUs
#
# The installation steps equal those of docs/getting-started.md.
FROM python:3.11-slim-bookworm

# cpu or cuda. The wheels of torch contain the CUDA libraries; the host provides the driver.
ARG DEVICE=cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# g++ compiles the CPU kernels for several instruction sets while owl2 is installed.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/owl2
COPY constraints.txt pyproject.toml hatch_build.py README.md LICENSE ./
COPY owl2 owl2

# PyPI has the CUDA build of torch; PyTorch's index has a CPU build of a tenth of the size.
RUN if [ "$DEVICE" = cpu ]; then index=(--extra-index-url https://download.pytorch.org/whl/cpu); else index=(); fi \
    && pip install --no-cache-dir --constraint constraints.txt "${index[@]}" torch \
    && pip install --no-cache-dir --constraint constraints.txt '.[serve,quant]'

# The home directory stores downloads from the hub between starts.
RUN useradd --create-home --uid 1000 owl2
USER 1000
WORKDIR /home/owl2
ENV HF_HOME=/home/owl2/.cache/huggingface \
    PYTHONUNBUFFERED=1
VOLUME ["/home/owl2/.cache", "/model"]
EXPOSE 8000

HEALTHCHECK --start-period=10m --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# `docker stop` sends SIGTERM: the server finishes its requests and rejects new ones.
STOPSIGNAL SIGTERM
ENTRYPOINT ["owl2"]
CMD ["serve", "--model", "/model", "--host", "0.0.0.0", "--port", "8000"]
