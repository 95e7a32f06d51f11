# The server for TPUs. From the root of the checkout, on a TPU VM:
#   docker build -t qwen-jax:tpu -f examples/containers/tpu.Dockerfile .
#   docker run --init --privileged --net=host --user 0 \
#       -v /srv/models:/models:ro -v qwen-cache:/srv/cache \
#       qwen-jax:tpu --ckpt /models/qwen --host 127.0.0.1
FROM python:3.12-slim
WORKDIR /srv
COPY pyproject.toml README.md LICENSE ./
COPY qwen_jax qwen_jax
COPY convert convert
RUN pip install --no-cache-dir --editable '.[tpu,serve,hub,gcs]'
# Compiled programs are kept here: a volume saves the next container from compiling them again.
RUN mkdir -m 1777 cache
ENV XDG_CACHE_HOME=/srv/cache PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# A platform that is named and not there is an error, and no quiet way to the CPU.
ENV JAX_PLATFORMS=tpu,cpu
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --start-period=30m --interval=10s --timeout=5s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python", "-m", "qwen_jax.serve", "--host", "0.0.0.0"]
CMD ["--ckpt", "/models/model"]
