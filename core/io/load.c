/* load.c: files of weights, whatever they are called: the first bytes say which reader is theirs. */
#include "io/format.h"
#include "io/pytorch.h"
#include "io/safetensors.h"

typedef orepa_archive *reader(const file_reader *file, const orepa_device *device);

static orepa_archive *read_any(const file_reader *file, const orepa_device *device) {
  if (pytorch_may_be(file))
    return pytorch_read(file, device);
  const char *what = format_is_safetensors(file) ? NULL : format_stranger(file);
  if (!what)
    return safetensors_read(file, device);
  format_refuse(file, NULL, "is neither a safetensors file nor a checkpoint of PyTorch's but %s", what);
  return NULL;
}

static orepa_archive *load(const char *path, const orepa_device *device, reader *read) {
  file_reader file;
  if (file_open(&file, path))
    return NULL;
  orepa_archive *archive = read(&file, device);
  file_close(&file);
  return archive;
}

orepa_archive *orepa_load(const char *path, const orepa_device *device) {
  return load(path, device, read_any);
}

orepa_archive *orepa_load_pytorch(const char *path, const orepa_device *device) {
  return load(path, device, pytorch_read);
}

orepa_archive *orepa_load_safetensors(const char *path, const orepa_device *device) {
  return load(path, device, safetensors_read);
}
