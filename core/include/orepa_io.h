/* orepa_io.h: weights in files. Include it beside orepa.h, whose rules for references and errors hold here too.
 *
 * An archive is what such a file holds: named tensors and string metadata, both in order. Names, keys and values are
 * UTF-8 and end at their first NUL. An archive belongs to one thread at a time. */
#ifndef OREPA_IO_H
#define OREPA_IO_H

#include "orepa.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct orepa_archive orepa_archive;

/* ---- archives ---------------------------------------------------------------------------------------------------- */

OREPA_API orepa_archive *orepa_archive_new(void);
OREPA_API void orepa_archive_free(orepa_archive *archive); /* NULL is allowed */

/* Keeps a reference to the tensor, not a copy: what it holds when the archive is saved is saved. A name that is taken
 * is refused, and so is "__metadata__", which the format keeps for itself. */
OREPA_API int orepa_archive_add(orepa_archive *archive, const char *name, orepa_tensor *t);
/* Replaces the value of a key that is there. */
OREPA_API int orepa_archive_set_metadata(orepa_archive *archive, const char *key, const char *value);

/* Positions are 0 ... count - 1; beyond them, and for a name that is not there, the answer is NULL and no message is
 * left. What is returned is borrowed: tensors until the archive is freed, strings until then or until their key is set
 * anew. */
OREPA_API size_t orepa_archive_count(const orepa_archive *archive);
OREPA_API const char *orepa_archive_name(const orepa_archive *archive, size_t position);
OREPA_API orepa_tensor *orepa_archive_tensor(const orepa_archive *archive, size_t position);
OREPA_API orepa_tensor *orepa_archive_find(const orepa_archive *archive, const char *name);

OREPA_API size_t orepa_archive_metadata_count(const orepa_archive *archive);
OREPA_API const char *orepa_archive_metadata_key(const orepa_archive *archive, size_t position);
OREPA_API const char *orepa_archive_metadata_value(const orepa_archive *archive, size_t position);
OREPA_API const char *orepa_archive_find_metadata(const orepa_archive *archive, const char *key);

/* ---- any of them ------------------------------------------------------------------------------------------------- */

/* Reads a safetensors file or a checkpoint of PyTorch's; the first bytes say which, not the name. */
OREPA_API orepa_archive *orepa_load(const char *path, const orepa_device *device);

/* ---- any bytes --------------------------------------------------------------------------------------------------- */

/* Writes a whole file: beside the path, synced and renamed, so that after a failure the path holds what it held before.
 */
OREPA_API int orepa_write_file(const char *path, const void *data, size_t bytes);

/* ---- safetensors ------------------------------------------------------------------------------------------------- */

/* Reads a whole file, its tensors onto the device, in the order of the file's header. The types are F32 BF16 F16 F64
 * I64 I32 U8 BOOL. A file that breaks a rule of the format is refused before any tensor is read; the message has the
 * path, the tensor and the rule. No more memory is asked for than the file's real size justifies, whatever it says of
 * itself. */
OREPA_API orepa_archive *orepa_load_safetensors(const char *path, const orepa_device *device);

/* Writes all tensors in logical order, views included. The header lists them in the archive's order; their bytes are
 * laid out by falling size of type, so that each is aligned. The file is written beside the path, synced and renamed:
 * after a failure the path holds what it held before. */
OREPA_API int orepa_save_safetensors(const char *path, const orepa_archive *archive);

/* ---- PyTorch's checkpoints: .pth, .pt, .pth.tar ------------------------------------------------------------------ */

/* Reads what torch.save wrote, in the ZIP container or the one before PyTorch 1.6, its tensors onto the device. Nothing
 * in the file is run. Dictionaries and lists become paths with dots: "state_dict.conv1.weight"; a lone tensor is called
 * "tensor". A module that was saved as an object is read as its state dict. Each tensor has its own contiguous memory,
 * whatever storage it shared in the file; one object under two names is one tensor.
 *
 * Numbers, strings, None, devices and types, and lists of those, are metadata, as JSON writes them, strings as they
 * are. What is neither (objects of classes, tensors of a type or with more dimensions than tensors have here) is kept
 * out: the metadata's "__kept_out__" has a line "path: what it is" for each.
 *
 * A file that breaks a rule of the format is refused before any tensor is read; so is one that is compressed,
 * big-endian or TorchScript. The message has the path, the place or the tensor, and the rule. Memory is asked
 * for as the file's real size justifies, whatever it says of itself: its tensors take at most 8 times that and 1 MiB,
 * its objects, whose description has at most 64 MiB, some hundred bytes each. */
OREPA_API orepa_archive *orepa_load_pytorch(const char *path, const orepa_device *device);
#ifdef __cplusplus
}
#endif
#endif
