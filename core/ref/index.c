/* index.c: elements found by integers. */
#include "ref/ref.h"

/* Where in `a` the element is that index names at its element k; -1: nowhere, and that is noted. */
static int64_t place_of(device_context *context, int axis, const device_array *a, const device_array *index,
                        int64_t k) {
  int64_t named = ref_get_integer(index, ref_at(index, k)), at = 0, place = 0;
  for (int d = index->rank; d-- > 0; k /= index->shape[d]) {
    int64_t position = k % index->shape[d];
    at += d == axis ? 0 : position * a->strides[d];
    place = d == axis ? position : place;
  }
  if (named >= 0 && named < a->shape[axis])
    return at + named * a->strides[axis];
  if (context->offence_position < 0 || place < context->offence_position) {
    context->offence = named;
    context->offence_position = place;
  }
  return -1;
}

device_status ref_gather(device_context *context, int axis, const device_array *y, const device_array *x,
                         const device_array *index) {
  REF_ENTRY;
  size_t size = orepa_dtype_size(x->dtype);
  for (int64_t k = 0; k < ref_count(index); k++) {
    int64_t from = place_of(context, axis, x, index, k);
    char *to = (char *)y->data + ref_at(y, k) * (int64_t)size;
    if (from < 0)
      memset(to, 0, size);
    else
      memcpy(to, (const char *)x->data + from * (int64_t)size, size);
  }
  return DEVICE_DONE;
}

/* Whether every element of index is a position. */
static bool all_are_places(device_context *context, int axis, const device_array *y, const device_array *index) {
  bool all = true;
  for (int64_t k = 0; k < ref_count(index); k++)
    all = place_of(context, axis, y, index, k) >= 0 && all;
  return all;
}

static void scatter_one(bool adds, const device_array *y, int64_t to, const device_array *x, int64_t from) {
  size_t size = orepa_dtype_size(x->dtype);
  if (!adds)
    memcpy((char *)y->data + to * (int64_t)size, (const char *)x->data + from * (int64_t)size, size);
  else if (y->dtype == OREPA_INT64)
    ref_set_integer(y, to, (int64_t)((uint64_t)ref_get_integer(y, to) + (uint64_t)ref_get_integer(x, from)));
  else
    ref_set(y, to, ref_get(y, to) + ref_get(x, from));
}

device_status ref_scatter(device_context *context, bool adds, int axis, const device_array *y, const device_array *x,
                          const device_array *index) {
  REF_ENTRY;
  if (adds && y->dtype != OREPA_FLOAT32 && y->dtype != OREPA_FLOAT64 && y->dtype != OREPA_INT64)
    return DEVICE_UNSUPPORTED;
  if (!all_are_places(context, axis, y, index))
    return DEVICE_DONE;
  for (int64_t k = 0; k < ref_count(index); k++)
    scatter_one(adds, y, place_of(context, axis, y, index, k), x, ref_at(x, k));
  return DEVICE_DONE;
}
