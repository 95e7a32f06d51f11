# The server for CPUs. From the root of the checkout:
#   docker build -t qwen-jax:cpu -f examples/containers/cpu.Dockerfile .
#   docker run --init -p 127.0.0.1:8000:8000 \
#       -v /srv/models:/models:ro -v qwen-cache:/srv/cache \
#       qwen-jax:cpu --ckpt /models/qwen
FROM python:3.12-slim
WORKDIR /srv
COPY pyproject.toml README.md LICENSE ./
COPY qwen_jax qwen_jax
COPY convert convert
RUN pip install --no-cache-dir --editable '.[serve,hub,gcs]'
# Compiled programs are kept here: a volume saves the next container from compiling them again.
RUN mkdir -m 1777 cache
ENV XDG_CACHE_HOME=/srv/cache PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
ENV JAX_PLATFORMS=cpu
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --start-period=30m --interval=10s --timeout=5s CMD \
    ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["python", "-m", "qwen_jax.serve", "--host", "0.0.0.0"]
CMD ["--ckpt", "/models/model"]
