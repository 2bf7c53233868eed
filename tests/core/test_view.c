/* test_view.c: views: which storage, strides and elements they see, when reshaping needs a copy, what is refused, and
 * the gradients of all of them. */
#include "engine_test.h"

/* ---- reshape ---- */

/* Reshapes a tensor and compares logical order; tells whether that was a view. */
static bool reshapes_as_view(orepa_tensor *t, int rank, const int64_t *shape) {
  double before[MOST_VALUES], after[MOST_VALUES];
  orepa_tensor *y = must(orepa_reshape(t, rank, shape));
  assert_int_equal(orepa_count(y), orepa_count(t));
  read_values(t, before);
  read_values(y, after);
  assert_memory_equal(before, after, (size_t)orepa_count(t) * sizeof *before);
  bool view = orepa_shares_storage(t, y);
  assert_true(view || orepa_is_contiguous(y));
  orepa_release(y);
  return view;
}

static void test_reshape_of_row_major_memory_is_a_view(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = numbered(device, SHAPE(2, 3, 4), 0);
    assert_true(reshapes_as_view(t, SHAPE(24)));
    assert_true(reshapes_as_view(t, SHAPE(6, 4)));
    assert_true(reshapes_as_view(t, SHAPE(2, 12)));
    assert_true(reshapes_as_view(t, SHAPE(4, 2, 3)));
    assert_true(reshapes_as_view(t, SHAPE(1, 2, 1, 3, 4, 1)));
    assert_true(reshapes_as_view(t, SHAPE(3, 2, 2, 2))); /* not channels-last, but right */
    assert_true(reshapes_as_view(t, SHAPE(2, 3, 4)));
    orepa_release(t);
  }
}

/* Channels-last memory is in logical order only where H = W = 1 or C = 1. */
static void test_flattening_a_map_copies_unless_it_is_one_pixel(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *map = numbered(device, SHAPE(2, 3, 4, 5), 0), *pixel = numbered(device, SHAPE(4, 6, 1, 1), 0);
    orepa_tensor *grey = numbered(device, SHAPE(2, 1, 4, 5), 0);
    assert_false(reshapes_as_view(map, SHAPE(2, 60)));
    assert_false(reshapes_as_view(map, SHAPE(120)));
    assert_false(reshapes_as_view(map, SHAPE(2, 15, 4)));
    assert_false(reshapes_as_view(map, SHAPE(4, 5, 6)));
    assert_true(reshapes_as_view(map, SHAPE(2, 3, 20))); /* H and W follow each other in memory */
    assert_true(reshapes_as_view(map, SHAPE(2, 3, 2, 2, 5)));
    assert_true(reshapes_as_view(map, SHAPE(1, 2, 3, 4, 5)));
    assert_true(reshapes_as_view(pixel, SHAPE(4, 6)));
    assert_true(reshapes_as_view(pixel, SHAPE(24)));
    assert_true(reshapes_as_view(grey, SHAPE(2, 20)));
    orepa_tensor *made[] = {map, pixel, grey};
    for (int k = 0; k < 3; k++)
      orepa_release(made[k]);
  }
}

static void test_reshape_of_views(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = numbered(device, SHAPE(4, 6), 0), *turned = must(orepa_transpose(t, 0, 1));
    orepa_tensor *every = must(orepa_slice(t, 1, 0, 6, 2)), *rows = must(orepa_slice(t, 0, 1, 3, 1));
    orepa_tensor *one = numbered(device, SHAPE(1, 6), 0), *many = must(orepa_expand(one, SHAPE(4, 6)));
    assert_false(reshapes_as_view(turned, SHAPE(24)));
    assert_true(reshapes_as_view(turned, SHAPE(3, 2, 4)));
    assert_true(reshapes_as_view(every, SHAPE(12))); /* every second element of all of them */
    assert_true(reshapes_as_view(every, SHAPE(2, 2, 3)));
    assert_true(reshapes_as_view(rows, SHAPE(12)));
    assert_false(reshapes_as_view(many, SHAPE(24)));
    assert_true(reshapes_as_view(many, SHAPE(2, 2, 6)));
    assert_true(reshapes_as_view(many, SHAPE(4, 2, 3)));
    orepa_tensor *made[] = {t, turned, every, rows, one, many};
    for (int k = 0; k < 6; k++)
      orepa_release(made[k]);
  }
}

/* All factorisations of all permutations of a small tensor, against logical order. */
static void test_reshape_keeps_logical_order_always(void **unused) {
  (void)unused;
  orepa_tensor *t = numbered(REF, SHAPE(2, 3, 1, 4), 0);
  for (int code = 0; code < 256; code++) {
    int axes[4] = {code & 3, code >> 2 & 3, code >> 4 & 3, code >> 6};
    if (((1 << axes[0]) | (1 << axes[1]) | (1 << axes[2]) | (1 << axes[3])) != 15)
      continue;
    orepa_tensor *turned = must(orepa_permute(t, axes));
    for (int64_t a = 1; a <= 24; a++)
      for (int64_t b = 1; a * b <= 24; b++)
        if (24 % (a * b) == 0) {
          reshapes_as_view(turned, SHAPE(a, b, 24 / a / b));
          reshapes_as_view(turned, SHAPE(a, 1, b, 24 / a / b));
        }
    orepa_release(turned);
  }
  orepa_release(t);
}

static void test_reshape_works_out_one_size(void **unused) {
  (void)unused;
  orepa_tensor *t = numbered(CPU, SHAPE(2, 3, 4), 0), *none = full(CPU, SHAPE(0, 3), 0), *one = full(CPU, SCALAR, 1);
  orepa_tensor *made[] = {must(orepa_reshape(t, SHAPE(-1))),       must(orepa_reshape(t, SHAPE(4, -1, 3))),
                          must(orepa_reshape(none, SHAPE(-1, 3))), must(orepa_reshape(one, SHAPE(1, -1))),
                          must(orepa_reshape(one, SCALAR)),        must(orepa_reshape(none, SHAPE(7, 0, 2)))};
  assert_shape(made[0], 24);
  assert_shape(made[1], 4, 2, 3);
  assert_shape(made[2], 0, 3);
  assert_shape(made[3], 1, 1);
  assert_int_equal(orepa_rank(made[4]), 0);
  assert_shape(made[5], 7, 0, 2);
  for (int k = 0; k < 6; k++)
    orepa_release(made[k]);
  assert_no_tensor(orepa_reshape(t, SHAPE(-1, -1)), "reshape: 2x3x4 has 24 elements and can't become -1x-1");
  assert_no_tensor(orepa_reshape(t, SHAPE(5, -1)), "can't become 5x-1");
  assert_no_tensor(orepa_reshape(t, SHAPE(5, 5)), "reshape: 2x3x4 has 24 elements and can't become 5x5");
  assert_no_tensor(orepa_reshape(t, SHAPE(-2, -12)), "can't become -2x-12");
  assert_no_tensor(orepa_reshape(t, SCALAR), "can't become scalar");
  assert_no_tensor(orepa_reshape(none, SHAPE(0, -1)), "reshape: 0x3 has 0 elements and can't become 0x-1");
  assert_no_tensor(orepa_reshape(t, SHAPE(4294967296, 4294967296)), "can't become 4294967296x4294967296");
  assert_no_tensor(orepa_reshape(none, SHAPE(0, INT64_MAX, 9)), "too large");
  assert_no_tensor(orepa_reshape(t, SHAPE(1, 1, 1, 1, 1, 1, 24)), "at most 6 dimensions, not 7");
  assert_no_tensor(orepa_reshape(t, -1, NULL), "at most 6 dimensions, not -1");
  orepa_release(t);
  orepa_release(none);
  orepa_release(one);
}

/* ---- permute, transpose ---- */

static void test_permute_moves_strides(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = numbered(device, SHAPE(2, 3, 2), 0), *p = must(orepa_permute(t, AXES(2, 0, -2)));
    assert_shape(p, 2, 2, 3);
    assert_strides(p, 1, 6, 2);
    assert_true(orepa_shares_storage(t, p) && !orepa_is_contiguous(p));
    assert_values(p, 0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11);
    orepa_tensor *map = numbered(device, SHAPE(2, 3, 2, 1), 0), *last = must(orepa_permute(map, AXES(0, 2, 3, 1)));
    orepa_tensor *q = must(orepa_transpose(t, -1, 0)), *back = must(orepa_transpose(q, 0, 2));
    assert_strides(last, 6, 3, 3, 1); /* the order in memory, seen */
    assert_values(q, 0, 6, 2, 8, 4, 10, 1, 7, 3, 9, 5, 11);
    assert_true(orepa_is_contiguous(back));
    orepa_tensor *made[] = {t, p, map, last, q, back};
    for (int k = 0; k < 6; k++)
      orepa_release(made[k]);
  }
}

static void test_permute_refuses_what_is_no_permutation(void **unused) {
  (void)unused;
  orepa_tensor *t = numbered(CPU, SHAPE(2, 3), 0), *one = full(CPU, SCALAR, 1);
  assert_no_tensor(orepa_permute(t, AXES(0, 0)), "permute: axis 1 is listed twice (tensor 2x3)");
  assert_no_tensor(orepa_permute(t, AXES(1, -1)), "permute: axis 2 is listed twice (tensor 2x3)");
  assert_no_tensor(orepa_permute(t, AXES(0, 2)), "permute: there is no axis 3 in a tensor of rank 2");
  assert_no_tensor(orepa_permute(t, AXES(-3, 1)), "permute: there is no axis -3 in a tensor of rank 2");
  assert_no_tensor(orepa_transpose(t, 0, 2), "transpose: there is no axis 3 in a tensor of rank 2");
  assert_no_tensor(orepa_transpose(one, 0, 0), "transpose: there is no axis 1 in a tensor of rank 0");
  orepa_tensor *same = must(orepa_permute(one, NULL));
  assert_values(same, 1);
  orepa_tensor *made[] = {t, one, same};
  for (int k = 0; k < 3; k++)
    orepa_release(made[k]);
}

/* ---- slice, select ---- */

static void test_slice_and_select_see_a_part(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = numbered(device, SHAPE(3, 4), 0);
    orepa_tensor *made[] = {
        must(orepa_slice(t, 0, 1, 3, 1)),        must(orepa_slice(t, 1, 1, 4, 2)), must(orepa_slice(t, -1, 0, 4, 3)),
        must(orepa_slice(t, 1, 2, 2, 1)),        must(orepa_select(t, 0, 2)),      must(orepa_select(t, 1, -4)),
        must(orepa_slice(t, 0, 0, 3, INT64_MAX))};
    for (int k = 0; k < 7; k++)
      assert_true(orepa_shares_storage(t, made[k]));
    assert_values(made[0], 4, 5, 6, 7, 8, 9, 10, 11);
    assert_values(made[1], 1, 3, 5, 7, 9, 11);
    assert_strides(made[1], 4, 2);
    assert_values(made[2], 0, 3, 4, 7, 8, 11);
    assert_shape(made[3], 3, 0);
    assert_values(made[4], 8, 9, 10, 11);
    assert_values(made[5], 0, 4, 8);
    assert_strides(made[5], 4);
    assert_values(made[6], 0, 1, 2, 3);
    done(orepa_fill_(made[1], -1)); /* writes where it looks, and nowhere else */
    assert_values(t, 0, -1, 2, -1, 4, -1, 6, -1, 8, -1, 10, -1);
    for (int k = 0; k < 7; k++)
      orepa_release(made[k]);
    orepa_release(t);
  }
}

static void test_views_of_views_keep_their_place(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = numbered(device, SHAPE(4, 5, 6), 0), *a = must(orepa_slice(t, 0, 1, 4, 2));
    orepa_tensor *b = must(orepa_permute(a, AXES(2, 0, 1))), *c = must(orepa_slice(b, 0, 1, 6, 3));
    orepa_tensor *d = must(orepa_select(c, 2, 3)), *e = must(orepa_detach(d));
    orepa_release(t); /* the view keeps the storage */
    orepa_release(a);
    orepa_release(b);
    orepa_release(c);
    assert_values(d, 49, 109, 52, 112); /* t[1][3][1], t[3][3][1], t[1][3][4], t[3][3][4] */
    assert_values(e, 49, 109, 52, 112);
    orepa_release(d);
    orepa_release(e);
  }
}

static void test_slice_and_select_refuse_other_positions(void **unused) {
  (void)unused;
  orepa_tensor *t = numbered(CPU, SHAPE(3, 4), 0), *one = full(CPU, SCALAR, 1);
  assert_no_tensor(orepa_slice(t, 1, 0, 5, 1), "slice: positions 1 to 5 in steps of 1 don't fit an axis of size 4");
  assert_no_tensor(orepa_slice(t, 1, 0, 5, 1), "(tensor 3x4)");
  assert_no_tensor(orepa_slice(t, 0, -1, 2, 1), "slice: positions 0 to 2");
  assert_no_tensor(orepa_slice(t, 0, 2, 1, 1), "slice: positions 3 to 1");
  assert_no_tensor(orepa_slice(t, 0, 0, 3, 0), "in steps of 0");
  assert_no_tensor(orepa_slice(t, 0, 0, 3, -1), "in steps of -1");
  assert_no_tensor(orepa_slice(t, 2, 0, 1, 1), "slice: there is no axis 3 in a tensor of rank 2");
  assert_no_tensor(orepa_select(t, 0, 3), "select: there is no position 4 in an axis of size 3 (tensor 3x4)");
  assert_no_tensor(orepa_select(t, 0, -4), "select: there is no position -4 in an axis of size 3 (tensor 3x4)");
  assert_no_tensor(orepa_select(t, -3, 0), "select: there is no axis -3 in a tensor of rank 2");
  assert_no_tensor(orepa_select(one, 0, 0), "select: there is no axis 1 in a tensor of rank 0");
  orepa_release(t);
  orepa_release(one);
}

/* ---- expand ---- */

static void test_expand_repeats_without_copying(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = numbered(device, SHAPE(2, 1), 1), *one = full(device, SCALAR, 5);
    orepa_tensor *made[] = {must(orepa_expand(t, SHAPE(2, 3))), must(orepa_expand(t, SHAPE(2, 2, 2))),
                            must(orepa_expand(t, SHAPE(2, 0))), must(orepa_expand(one, SHAPE(2, 2))),
                            must(orepa_expand(t, SHAPE(2, 1)))};
    for (int k = 0; k < 5; k++)
      assert_true(orepa_shares_storage(k == 3 ? one : t, made[k]));
    assert_strides(made[0], 1, 0);
    assert_values(made[0], 1, 1, 1, 2, 2, 2);
    assert_strides(made[1], 0, 1, 0);
    assert_values(made[1], 1, 1, 2, 2, 1, 1, 2, 2);
    assert_shape(made[2], 2, 0);
    assert_values(made[3], 5, 5, 5, 5);
    assert_true(orepa_is_contiguous(made[4]));
    for (int k = 0; k < 5; k++)
      orepa_release(made[k]);
    orepa_release(t);
    orepa_release(one);
  }
}

/* A shape whose elements can't be counted is refused here, before an op counts them. */
static void test_expand_refuses_what_does_not_broadcast(void **unused) {
  (void)unused;
  orepa_tensor *t = numbered(CPU, SHAPE(2, 3), 0), *one = full(CPU, SHAPE(1, 1), 1);
  assert_no_tensor(orepa_expand(t, SHAPE(2, 4)), "expand: 2x3 does not broadcast to 2x4");
  assert_no_tensor(orepa_expand(t, SHAPE(3, 3)), "expand: 2x3 does not broadcast to 3x3");
  assert_no_tensor(orepa_expand(t, SHAPE(3)), "expand: 2x3 does not broadcast to 3");
  assert_no_tensor(orepa_expand(one, SHAPE(-1, 2)), "does not broadcast to -1x2");
  assert_no_tensor(orepa_expand(one, SHAPE(1, 1, 1, 1, 1, 1, 1)), "expand: 1x1 does not broadcast");
  assert_no_tensor(orepa_expand(one, SHAPE(4294967296, 4294967296)), "4294967296x4294967296 is too large to address");
  assert_no_tensor(orepa_expand(one, SHAPE(INT64_MAX, 3)), "too large to address");
  orepa_release(t);
  orepa_release(one);
}

/* ---- gradients: weights 1, 2, ... of the view's elements come back at the elements that it sees ---- */

/* Backward of sum(view * weights) with a fresh leaf; gives the leaf's gradient. */
static orepa_tensor *gradient(orepa_tensor *leaf, orepa_tensor *view) {
  must(view);
  orepa_tensor *dy = numbered(orepa_tensor_device(view), orepa_rank(view), orepa_shape(view), 1);
  done(orepa_backward(view, dy, false));
  orepa_tensor *grad = must(orepa_retain(orepa_grad(leaf)));
  assert_true(orepa_is_contiguous(grad) && !orepa_shares_storage(grad, dy));
  done(orepa_set_grad(leaf, NULL));
  orepa_release(dy);
  orepa_release(view);
  return grad;
}

#define assert_gradient(leaf, view, ...)                                                                               \
  do {                                                                                                                 \
    orepa_tensor *grad_ = gradient(leaf, view);                                                                        \
    assert_values(grad_, __VA_ARGS__);                                                                                 \
    orepa_release(grad_);                                                                                              \
  } while (0)

static void test_gradients_of_views(void **unused) {
  (void)unused;
  for_each_device(device) {
    orepa_tensor *t = wanting(numbered(device, SHAPE(2, 3), 0)), *one = wanting(full(device, SHAPE(2, 1), 1));
    assert_gradient(t, orepa_reshape(t, SHAPE(3, 2)), 1, 2, 3, 4, 5, 6);
    assert_gradient(t, orepa_transpose(t, 0, 1), 1, 3, 5, 2, 4, 6);
    assert_gradient(t, orepa_slice(t, 1, 0, 3, 2), 1, 0, 2, 3, 0, 4);
    assert_gradient(t, orepa_select(t, 0, -1), 0, 0, 0, 1, 2, 3);
    assert_gradient(t, orepa_slice(t, 1, 1, 1, 1), 0, 0, 0, 0, 0, 0);
    assert_gradient(one, orepa_expand(one, SHAPE(2, 3)), 6, 15);
    assert_gradient(one, orepa_expand(one, SHAPE(2, 2, 2)), 14, 22);
    assert_gradient(one, orepa_expand(one, SHAPE(2, 0)), 0, 0);
    assert_gradient(t, orepa_clone(t), 1, 2, 3, 4, 5, 6);
    orepa_tensor *map = wanting(numbered(device, SHAPE(1, 2, 2, 2), 0));
    assert_gradient(map, orepa_reshape(map, SHAPE(8)), 1, 2, 3, 4, 5, 6, 7, 8); /* a copy */
    assert_gradient(map, orepa_permute(map, AXES(3, 1, 2, 0)), 1, 5, 2, 6, 3, 7, 4, 8);
    orepa_tensor *made[] = {t, one, map};
    for (int k = 0; k < 3; k++)
      orepa_release(made[k]);
  }
}

static void test_detach_leaves_the_graph(void **unused) {
  (void)unused;
  orepa_tensor *x = wanting(numbered(CPU, SHAPE(2), 1)), *y = must(orepa_mul(x, x)), *d = must(orepa_detach(y));
  assert_true(orepa_requires_grad(y) && !orepa_is_leaf(y));
  assert_true(!orepa_requires_grad(d) && orepa_is_leaf(d) && orepa_shares_storage(y, d));
  assert_values(d, 1, 4);
  assert_gradient(x, orepa_mul(x, d), 1, 8);
  orepa_tensor *made[] = {x, y, d};
  for (int k = 0; k < 3; k++)
    orepa_release(made[k]);
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(test_reshape_of_row_major_memory_is_a_view),
      cmocka_unit_test(test_flattening_a_map_copies_unless_it_is_one_pixel),
      cmocka_unit_test(test_reshape_of_views),
      cmocka_unit_test(test_reshape_keeps_logical_order_always),
      cmocka_unit_test(test_reshape_works_out_one_size),
      cmocka_unit_test(test_permute_moves_strides),
      cmocka_unit_test(test_permute_refuses_what_is_no_permutation),
      cmocka_unit_test(test_slice_and_select_see_a_part),
      cmocka_unit_test(test_views_of_views_keep_their_place),
      cmocka_unit_test(test_slice_and_select_refuse_other_positions),
      cmocka_unit_test(test_expand_repeats_without_copying),
      cmocka_unit_test(test_expand_refuses_what_does_not_broadcast),
      cmocka_unit_test(test_gradients_of_views),
      cmocka_unit_test(test_detach_leaves_the_graph),
  };
  RUN_GUARDED_AND_NOT(tests);
}
