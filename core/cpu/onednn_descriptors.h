/* onednn_descriptors.h: oneDNN's descriptors, the same for its versions 2 and 3. This header and its file are all that
 * knows the version: what is declared here, and every call of the library made elsewhere, means the same in both. */
#ifndef OREPA_CORE_CPU_ONEDNN_DESCRIPTORS_H
#define OREPA_CORE_CPU_ONEDNN_DESCRIPTORS_H

#include <oneapi/dnnl/dnnl.h>

#include "cpu/conv.h"

#define ONEDNN_TRY(call)                                                                                               \
  do {                                                                                                                 \
    dnnl_status_t try_status = (call);                                                                                 \
    if (try_status != dnnl_success)                                                                                    \
      return try_status;                                                                                               \
  } while (0)

/* What everything is made with. */
typedef struct {
  dnnl_engine_t engine;
  dnnl_stream_t stream;
  dnnl_primitive_attr_t attributes; /* scratchpads are the caller's */
} onednn_library;

/* Type, shape and strides of an array, as the library's calls take them. */
#if DNNL_VERSION_MAJOR < 3
typedef const dnnl_memory_desc_t *onednn_layout;
#else
typedef const_dnnl_memory_desc_t onednn_layout;
#endif

/* Elements of OREPA_FLOAT32 or OREPA_BFLOAT16. Strides NULL: in the order that the library likes best. */
dnnl_status_t onednn_layout_new(onednn_layout *layout, int64_t dtype, int rank, const int64_t *shape,
                                const int64_t *strides);
/* Of one that onednn_layout_new made, or NULL; not of one that a primitive's descriptor was asked for. */
void onednn_layout_free(onednn_layout layout);

/* One convolution. x (N, C, H, W), w and its gradient dw (O, I, H, W) or, in groups, (G, O, I, H, W), y (N, O, H, W),
 * bias (O) or NULL; dilation 0 is a kernel without holes; pixels of padding before and after the map. */
typedef struct {
  onednn_layout x, w, dw, y, bias;
  dnnl_dims_t stride, dilation, before, after;
} onednn_conv_layouts;

/* Attributes: scratchpads are the caller's; to the result an array like `residual` is added, unless that is NULL, then
 * comes a ReLU, if asked for. To be destroyed even when the call failed, if they were made. */
dnnl_status_t onednn_attributes_new(dnnl_primitive_attr_t *attributes, onednn_layout residual, bool relu);

/* Descriptors of primitives, to be destroyed even when the call failed, if they were made. Bias is read by the forward
 * direction; the gradients take the descriptor of that direction, made without bias, as `forward`. */
dnnl_status_t onednn_describe_conv(const onednn_library *library, conv_direction direction,
                                   const onednn_conv_layouts *layouts, const_dnnl_primitive_attr_t attributes,
                                   const_dnnl_primitive_desc_t forward, dnnl_primitive_desc_t *desc);
/* Whether the library gets this one wrong when it runs this implementation. */
bool onednn_conv_is_wrong(conv_direction direction, const onednn_conv_layouts *layouts, const char *implementation);
/* c (batch, m, n) = a (batch or 1, m, k) . b (batch or 1, k, n) + bias (1, 1, n) or NULL */
dnnl_status_t onednn_describe_product(const onednn_library *library, onednn_layout a, onednn_layout b,
                                      onednn_layout bias, onednn_layout c, dnnl_primitive_desc_t *desc);
/* The same elements in another layout. */
dnnl_status_t onednn_describe_copy(const onednn_library *library, onednn_layout from, onednn_layout to,
                                   dnnl_primitive_desc_t *desc);

#endif
