# Head, teachers (vLLM) and students (DeepSpeed) on NVIDIA GPUs:
#   docker build -f clusters/images/cuda.Dockerfile -t rayfuse:cuda .
FROM nvidia/cuda:12.9.1-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv git wget ninja-build \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/rayfuse
ENV PATH=/opt/rayfuse/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/shared/hub
WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE ./
COPY rayfuse rayfuse
RUN pip install --no-cache-dir ".[vllm,deepspeed]"
RUN useradd --create-home --uid 1000 ray
USER ray
WORKDIR /home/ray
