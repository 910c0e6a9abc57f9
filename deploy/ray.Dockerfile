# An image for every node of a Ray cluster: Ray's own, which has what KubeRay asks of it, and the package.
#   docker build -f deploy/ray.Dockerfile -t specontext:ray .
#   docker build -f deploy/ray.Dockerfile -t specontext:ray --build-arg BASE=rayproject/ray:2.60.0-py312-cpu .
ARG BASE=rayproject/ray:2.60.0-py312-gpu
FROM ${BASE}
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 HF_HOME=/models/huggingface XDG_CACHE_HOME=/models/cache
WORKDIR /home/ray/specontext
COPY --chown=ray pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ray specontext ./specontext
RUN pip install -c constraints.txt '.[gguf,triton,ray]' \
    && sudo mkdir -p /models \
    && sudo chown ray /models
