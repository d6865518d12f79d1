# EdgeVLM for a Jetson Orin with JetPack 6 (L4T R36): CUDA 12.6 and TensorRT 10.3.  Not run on hardware yet.
#
#   docker build -f export/docker/jetpack6.Dockerfile -t edgevlm:jetpack6 .
#
# The driver's libraries come from the board when the container starts (--runtime nvidia): nothing here imports TensorRT.
FROM nvcr.io/nvidia/l4t-jetpack:r36.4.0

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-venv python3-libnvinfer \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/edgevlm
COPY pyproject.toml README.md LICENSE ./
COPY edgevlm edgevlm
# The environment sees the system's packages: JetPack's Python module of TensorRT is one of them.
RUN python3 -m venv --system-site-packages /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir . 'cuda-python>=12.6,<13'

ENV PATH=/opt/venv/bin:$PATH
WORKDIR /data
ENTRYPOINT ["edgevlm"]
