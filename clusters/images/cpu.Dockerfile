# Heads, and everything else on clusters without GPUs:
#   docker build -f clusters/images/cpu.Dockerfile -t rayfuse:cpu .
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git wget g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/rayfuse
ENV PATH=/opt/rayfuse/bin:$PATH PYTHONUNBUFFERED=1 HF_HOME=/shared/hub
WORKDIR /opt/source
COPY pyproject.toml README.md LICENSE ./
COPY rayfuse rayfuse
# A torch without CUDA is a fifth of the size; name a registry that has it by --build-arg PIP_EXTRA_INDEX_URL=...
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir .
RUN useradd --create-home --uid 1000 ray
USER ray
WORKDIR /home/ray
