# EdgeVLM for a Jetson Thor with JetPack 7 (L4T R38): CUDA 13 and TensorRT 10.13.  Not run on hardware yet.
#
#   docker build -f export/docker/jetpack7.Dockerfile -t edgevlm:jetpack7 .
#
# NVIDIA's image for Arm servers, which Thor runs since JetPack 7.  Another one: --build-arg BASE=...
ARG BASE=nvcr.io/nvidia/tensorrt:25.08-py3
FROM ${BASE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/edgevlm
COPY pyproject.toml README.md LICENSE ./
COPY edgevlm edgevlm
# The environment sees the system's packages: the image's Python module of TensorRT is one of them.
RUN python3 -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir . 'cuda-python>=13,<14'

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["edgevlm"]
