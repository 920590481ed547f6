# ducat with PyTorch's build for CPUs: docker build -t ducat . && docker run --rm ducat
FROM python:3.11-slim
WORKDIR /opt/ducat
COPY requirements.lock pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --require-hashes -r requirements.lock \
    && pip install --no-cache-dir --no-deps . \
    && useradd --create-home ducat
USER ducat
WORKDIR /home/ducat
ENTRYPOINT ["ducat"]
CMD ["zoo", "--evaluate"]
