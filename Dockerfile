# jaxlab in a container, for Kubernetes and Slurm:
#   docker build --build-arg EXTRA=tpu -t REGISTRY/jaxlab:COMMIT .
# EXTRA: tpu or gpu.
FROM python:3.12-slim
ARG EXTRA=tpu
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
WORKDIR /jaxlab
# The packages first: they change less often than the code.
COPY requirements.txt pyproject.toml README.md LICENSE ./
COPY jaxlab/__init__.py jaxlab/__init__.py
RUN pip install ".[${EXTRA}]" && pip uninstall -y jaxlab
COPY . .
RUN pip install --no-deps -e .
CMD ["jaxlab", "doctor"]
