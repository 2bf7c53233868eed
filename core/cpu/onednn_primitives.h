/* onednn_primitives.h: a convolution or a matrix product made ready in oneDNN: the primitive, the packing of its kernel
 * and a memory for each argument, so that a call only sets pointers. onednn.c keeps them. */
#ifndef OREPA_CORE_CPU_ONEDNN_PRIMITIVES_H
#define OREPA_CORE_CPU_ONEDNN_PRIMITIVES_H

#include "cpu/onednn.h"
#include "cpu/onednn_descriptors.h"

enum {
  ARGUMENT_X,
  ARGUMENT_W,
  ARGUMENT_Y,
  ARGUMENT_BIAS,
  ARGUMENT_RESIDUAL,
  ARGUMENT_SCRATCHPAD,
  ARGUMENTS,
};

typedef struct {
  const char *implementation; /* the library's name for it; lives as long as desc */
  dnnl_primitive_desc_t desc, hint;
  dnnl_primitive_t primitive;
  dnnl_exec_arg_t arguments[ARGUMENTS]; /* absent ones without a memory */
  size_t scratchpad_bytes;
  /* Of convolutions whose kernel is wanted in a layout other than ours: from ours to it, or back. */
  dnnl_primitive_desc_t packing_desc;
  dnnl_primitive_t packing;
  bool unpacks; /* the kernel is the result */
  dnnl_memory_t kernel, packing_scratchpad;
  size_t packed_bytes, packing_bytes;
  int64_t mark;          /* of the packed kernel's layout; given by the store */
  size_t kernel_offset;  /* bytes before the taps in use */
  size_t kernel_cleared; /* bytes to clear before the taps' gradients arrive: the kernel, where taps are left out */
} onednn_primitive;

/* Both take a zeroed primitive, and leave what is to be freed also when they fail. dnnl_unimplemented: the library
 * should not be given this one. `follows`: a set of FOLLOWED_BY_*. */
dnnl_status_t onednn_make_conv(onednn_primitive *p, const onednn_library *library, conv_direction direction,
                               const conv_geometry *g, int follows);
dnnl_status_t onednn_make_product(onednn_primitive *p, const onednn_library *library, const onednn_matmul_shape *s,
                                  bool has_bias);
void onednn_primitive_free(onednn_primitive *p);
/* Whether both pack any kernel in the same way: the same bytes from the same numbers. */
bool onednn_same_packing(const onednn_primitive *p, const onednn_primitive *q);

/* Bytes of scratch that a run needs. */
size_t onednn_primitive_scratch(const onednn_primitive *p);
/* Runs what belongs together: packing, the primitive, unpacking. `given` is in the order of the arguments; the
 * scratchpad's place is not read. The kernel is packed into `packed`, or was; NULL: into scratch. */
dnnl_status_t onednn_primitive_run(onednn_primitive *p, const onednn_library *library, void *const given[ARGUMENTS],
                                   const device_packed *packed, char *scratch);

#endif
