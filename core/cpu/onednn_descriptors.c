/* onednn_descriptors.c: makes the library's descriptors. Version 2 first describes an operation, then asks for a
 * primitive's descriptor; its layouts are plain structs. Version 3 does it in one call; its layouts are handles. */
#include "cpu/onednn_descriptors.h"

#include <stdlib.h>
#include <string.h>

static dnnl_data_type_t data_type(int64_t dtype) {
  return dtype == OREPA_BFLOAT16 ? dnnl_bf16 : dnnl_f32;
}

dnnl_status_t onednn_describe_copy(const onednn_library *library, onednn_layout from, onednn_layout to,
                                   dnnl_primitive_desc_t *desc) {
  return dnnl_reorder_primitive_desc_create(desc, from, library->engine, to, library->engine, library->attributes);
}

static dnnl_status_t append_relu(dnnl_post_ops_t after) {
#if DNNL_VERSION_MAJOR < 3
  return dnnl_post_ops_append_eltwise(after, 1, dnnl_eltwise_relu, 0, 0);
#else
  return dnnl_post_ops_append_eltwise(after, dnnl_eltwise_relu, 0, 0);
#endif
}

dnnl_status_t onednn_attributes_new(dnnl_primitive_attr_t *attributes, onednn_layout residual, bool relu) {
  dnnl_post_ops_t after = NULL;
  dnnl_status_t status = dnnl_primitive_attr_create(attributes);
  if (status == dnnl_success)
    status = dnnl_primitive_attr_set_scratchpad_mode(*attributes, dnnl_scratchpad_mode_user);
  if (status == dnnl_success)
    status = dnnl_post_ops_create(&after);
  if (status == dnnl_success && residual)
    status = dnnl_post_ops_append_binary(after, dnnl_binary_add, residual);
  if (status == dnnl_success && relu)
    status = append_relu(after);
  if (status == dnnl_success)
    status = dnnl_primitive_attr_set_post_ops(*attributes, after);
  dnnl_post_ops_destroy(after);
  return status;
}

#if DNNL_VERSION_MAJOR < 3

dnnl_status_t onednn_layout_new(onednn_layout *layout, int64_t dtype, int rank, const int64_t *shape,
                                const int64_t *strides) {
  dnnl_dims_t dims = {0}, steps = {0};
  dnnl_memory_desc_t *made = malloc(sizeof *made);
  if (!made)
    return dnnl_out_of_memory;
  *layout = made;
  memcpy(dims, shape, (size_t)rank * sizeof *dims);
  if (!strides)
    return dnnl_memory_desc_init_by_tag(made, rank, dims, data_type(dtype), dnnl_format_tag_any);
  memcpy(steps, strides, (size_t)rank * sizeof *steps);
  return dnnl_memory_desc_init_by_strides(made, rank, dims, data_type(dtype), steps);
}

void onednn_layout_free(onednn_layout layout) {
  free((void *)layout);
}

dnnl_status_t onednn_describe_conv(const onednn_library *library, conv_direction direction,
                                   const onednn_conv_layouts *l, const_dnnl_primitive_attr_t attributes,
                                   const_dnnl_primitive_desc_t forward, dnnl_primitive_desc_t *desc) {
  dnnl_convolution_desc_t op;
  dnnl_status_t status =
      direction == CONV_FORWARD
          ? dnnl_dilated_convolution_forward_desc_init(&op, dnnl_forward_training, dnnl_convolution_direct, l->x, l->w,
                                                       l->bias, l->y, l->stride, l->dilation, l->before, l->after)
      : direction == CONV_BACKWARD_DATA
          ? dnnl_dilated_convolution_backward_data_desc_init(&op, dnnl_convolution_direct, l->x, l->w, l->y, l->stride,
                                                             l->dilation, l->before, l->after)
          : dnnl_dilated_convolution_backward_weights_desc_init(&op, dnnl_convolution_direct, l->x, l->dw, NULL, l->y,
                                                                l->stride, l->dilation, l->before, l->after);
  ONEDNN_TRY(status);
  return dnnl_primitive_desc_create(desc, &op, attributes, library->engine, forward);
}

/* 2.6.3's AMX kernels get some weight gradients of dilated convolutions wrong. */
bool onednn_conv_is_wrong(conv_direction direction, const onednn_conv_layouts *l, const char *implementation) {
  bool dilated = l->dilation[0] > 0 || l->dilation[1] > 0;
  return direction == CONV_BACKWARD_WEIGHT && dilated && strstr(implementation, "amx");
}

dnnl_status_t onednn_describe_product(const onednn_library *library, onednn_layout a, onednn_layout b,
                                      onednn_layout bias, onednn_layout c, dnnl_primitive_desc_t *desc) {
  dnnl_matmul_desc_t op;
  ONEDNN_TRY(dnnl_matmul_desc_init(&op, a, b, bias, c));
  return dnnl_primitive_desc_create(desc, &op, library->attributes, library->engine, NULL);
}

#else

dnnl_status_t onednn_layout_new(onednn_layout *layout, int64_t dtype, int rank, const int64_t *shape,
                                const int64_t *strides) {
  dnnl_dims_t dims = {0}, steps = {0};
  dnnl_memory_desc_t made = NULL;
  memcpy(dims, shape, (size_t)rank * sizeof *dims);
  if (strides)
    memcpy(steps, strides, (size_t)rank * sizeof *steps);
  dnnl_status_t status =
      strides ? dnnl_memory_desc_create_with_strides(&made, rank, dims, data_type(dtype), steps)
              : dnnl_memory_desc_create_with_tag(&made, rank, dims, data_type(dtype), dnnl_format_tag_any);
  *layout = made;
  return status;
}

void onednn_layout_free(onednn_layout layout) {
  if (layout)
    dnnl_memory_desc_destroy((dnnl_memory_desc_t)layout);
}

dnnl_status_t onednn_describe_conv(const onednn_library *library, conv_direction direction,
                                   const onednn_conv_layouts *l, const_dnnl_primitive_attr_t attributes,
                                   const_dnnl_primitive_desc_t forward, dnnl_primitive_desc_t *desc) {
  dnnl_engine_t engine = library->engine;
  if (direction == CONV_FORWARD)
    return dnnl_convolution_forward_primitive_desc_create(desc, engine, dnnl_forward_training, dnnl_convolution_direct,
                                                          l->x, l->w, l->bias, l->y, l->stride, l->dilation, l->before,
                                                          l->after, attributes);
  if (direction == CONV_BACKWARD_DATA)
    return dnnl_convolution_backward_data_primitive_desc_create(desc, engine, dnnl_convolution_direct, l->x, l->w, l->y,
                                                                l->stride, l->dilation, l->before, l->after, forward,
                                                                attributes);
  return dnnl_convolution_backward_weights_primitive_desc_create(desc, engine, dnnl_convolution_direct, l->x, l->dw,
                                                                 NULL, l->y, l->stride, l->dilation, l->before,
                                                                 l->after, forward, attributes);
}

/* None is known. (Weight gradients of strided 1x1 kernels, which onednn.h tells of, are not given to any version.) */
bool onednn_conv_is_wrong(conv_direction direction, const onednn_conv_layouts *l, const char *implementation) {
  (void)direction, (void)l, (void)implementation;
  return false;
}

dnnl_status_t onednn_describe_product(const onednn_library *library, onednn_layout a, onednn_layout b,
                                      onednn_layout bias, onednn_layout c, dnnl_primitive_desc_t *desc) {
  return dnnl_matmul_primitive_desc_create(desc, library->engine, a, b, bias, c, library->attributes);
}

#endif
