/* test_deferred_kernels.c: kernels that take a map or a gradient in parts give the bits of the separate kernels that
 * would have stored it: a norm added to another, a gradient that is summed, masked or behind a max pool while a norm
 * reads it, a pool over a map that is normalised as it is read. On ref and on every instruction set. */
#include "kernel_test.h"

#include "elementwise.h"

enum { DEVICES = CPU_ISAS + 1 };

static const orepa_device *table_number(int k) {
  return k == CPU_ISAS ? ref_device() : cpu_device_for((cpu_isa)k);
}

/* The devices of this machine. */
#define for_each_table(device)                                                                                         \
  for (int table_ = 0; table_ < DEVICES; table_++)                                                                     \
    for (const orepa_device *device = table_number(table_); device; device = NULL)

static const struct {
  int rank;
  int64_t shape[OREPA_MAX_RANK];
} cases[] = {
    {4, {2, 64, 14, 14}}, {4, {3, 13, 9, 11}}, {4, {2, 3, 6, 7}},   {4, {1, 600, 5, 4}}, {4, {5, 1, 8, 8}},
    {2, {300, 33}},       {3, {4, 17, 29}},    {4, {1, 8, 70, 70}}, {4, {2, 16, 1, 1}},  {4, {0, 4, 5, 5}},
};
enum { CASES = sizeof cases / sizeof *cases };

/* Maps and, for each channel, parameters of a norm. */
typedef struct {
  device_context context;
  orepa_dtype dtype;
  test_array x, r, g, h;                     /* maps */
  test_array scale, shift, r_scale, r_shift; /* (C) */
  test_array mean, inverse, weight;          /* (C) */
  test_array made[24];
  int count;
} setting;

static setting setting_new(const orepa_device *device, orepa_dtype dtype, int k) {
  setting s = {.context = test_context(device), .dtype = dtype};
  test_array *maps[] = {&s.x, &s.r, &s.g, &s.h};
  test_array *channels[] = {&s.scale, &s.shift, &s.r_scale, &s.r_shift, &s.mean, &s.inverse, &s.weight};
  for (uint64_t n = 0; n < 4; n++) {
    *maps[n] = test_new(dtype, LAYOUT_DENSE, cases[k].rank, cases[k].shape);
    test_fill_normal(maps[n], 7 + n, 0.25, 1);
  }
  for (uint64_t n = 0; n < 7; n++) {
    *channels[n] = test_new(OREPA_FLOAT32, n % 2 ? LAYOUT_GAPS : LAYOUT_DENSE, 1, &cases[k].shape[1]);
    test_fill_normal(channels[n], 70 + n, n % 2 ? 0 : 1, 0.5);
  }
  return s;
}

static void setting_free(setting *s) {
  test_array *all[] = {&s->x,       &s->r,       &s->g,    &s->h,       &s->scale, &s->shift,
                       &s->r_scale, &s->r_shift, &s->mean, &s->inverse, &s->weight};
  for (size_t n = 0; n < sizeof all / sizeof *all; n++)
    test_release(all[n]);
  for (int n = 0; n < s->count; n++) {
    assert_true(test_clean(&s->made[n]));
    test_release(&s->made[n]);
  }
  test_context_free(&s->context);
}

static device_array *room(setting *s, const test_array *like) {
  assert_true(s->count < 24);
  s->made[s->count] = test_copy(like);
  return &s->made[s->count++].a;
}

/* ---- separate kernels ---- */

static const device_number none[ELEMENTWISE_MAX_SOURCES];

static void add(setting *s, const device_array *sum, const device_array *a, const device_array *b) {
  const device_array sources[ELEMENTWISE_MAX_OPERANDS] = {*a, *b};
  assert_int_equal(s->context.device->elementwise(&s->context, FUNCTION_add, 0, sum, sources, none), DEVICE_DONE);
}

static void relu(setting *s, const device_array *z, const device_array *x) {
  const device_array sources[ELEMENTWISE_MAX_OPERANDS] = {*x};
  assert_int_equal(s->context.device->elementwise(&s->context, FUNCTION_relu, 0, z, sources, none), DEVICE_DONE);
}

static void mask(setting *s, const device_array *dx, const device_array *dy, const device_array *z) {
  device_array sources[ELEMENTWISE_MAX_SOURCES] = {*dy};
  sources[4] = *z;
  assert_int_equal(s->context.device->elementwise(&s->context, FUNCTION_relu, 1, dx, sources, none), DEVICE_DONE);
}

static void apply(setting *s, const device_array *z, const test_array *x, const test_array *scale,
                  const test_array *shift) {
  assert_int_equal(s->context.device->norm_apply(&s->context, z, &x->a, &scale->a, &shift->a, NULL, NULL, NULL, false),
                   DEVICE_DONE);
}

/* ---- forward ---- */

static void check_forward(setting *s) {
  device_array *a = room(s, &s->x), *b = room(s, &s->x), *found = room(s, &s->x), *wanted = room(s, &s->x);
  apply(s, a, &s->x, &s->scale, &s->shift);
  apply(s, b, &s->r, &s->r_scale, &s->r_shift);
  for (int second = 0; second < 2; second++)
    for (int active = 0; active < 2; active++) {
      add(s, wanted, a, second ? b : &s->r.a);
      if (active)
        relu(s, wanted, wanted);
      assert_int_equal(s->context.device->norm_apply(&s->context, found, &s->x.a, &s->scale.a, &s->shift.a, &s->r.a,
                                                     second ? &s->r_scale.a : NULL, second ? &s->r_shift.a : NULL,
                                                     active),
                       DEVICE_DONE);
      assert_true(test_same(found, wanted));
    }
}

static void a_norm_and_what_is_added_to_it(void **unused) {
  (void)unused;
  for_each_table(device) for (int k = 0; k < CASES; k++) for (int half = 0; half < 2; half++) {
    setting s = setting_new(device, half ? OREPA_BFLOAT16 : OREPA_FLOAT32, k);
    check_forward(&s);
    test_sprinkle(&s.x, 3);
    test_sprinkle(&s.r, 4);
    check_forward(&s);
    setting_free(&s);
  }
}

/* ---- a norm's gradient ---- */

typedef struct {
  device_array *dx, *dweight, *dbias;
} gradients;

static gradients backward(setting *s, bool batch, const device_gradient *dy) {
  gradients g = {room(s, &s->x), room(s, &s->mean), room(s, &s->mean)};
  assert_int_equal(s->context.device->norm_backward(&s->context, batch, g.dx, g.dweight, g.dbias, dy, &s->x.a,
                                                    &s->mean.a, &s->inverse.a, &s->weight.a),
                   DEVICE_DONE);
  return g;
}

static void check_same_gradients(setting *s, bool batch, const device_gradient *parts, const device_array *whole) {
  gradients found = backward(s, batch, parts), wanted = backward(s, batch, &(device_gradient){.dy = whole});
  assert_true(test_same(found.dx, wanted.dx));
  assert_true(test_same(found.dweight, wanted.dweight));
  assert_true(test_same(found.dbias, wanted.dbias));
  assert_true(!parts->kept || test_same(parts->kept, whole));
}

/* `parts` without a mask is `whole`: with each mask, stored and not. */
static void check_masks(const orepa_device *device, orepa_dtype dtype, int k,
                        void (*unmasked)(setting *, device_gradient *, device_array *whole)) {
  for (int kind = 0; kind < 3; kind++)
    for (int kept = 0; kept < 2; kept++) {
      setting s = setting_new(device, dtype, k);
      device_gradient parts = {.dy = NULL};
      device_array *whole = room(&s, &s.x), *z = room(&s, &s.x);
      unmasked(&s, &parts, whole);
      apply(&s, z, &s.x, &s.scale, &s.shift);
      relu(&s, z, z);
      if (kind == 1)
        parts.result = z;
      if (kind == 2) {
        parts.scale = &s.scale.a;
        parts.shift = &s.shift.a;
      }
      if (kind)
        mask(&s, whole, whole, z);
      if (kept)
        parts.kept = room(&s, &s.x);
      check_same_gradients(&s, kept, &parts, whole);
      check_same_gradients(&s, !kept, &parts, whole);
      setting_free(&s);
    }
}

static void one_gradient(setting *s, device_gradient *parts, device_array *whole) {
  parts->dy = &s->g.a;
  memcpy(whole->data, s->g.a.data, (size_t)test_count(whole) * orepa_dtype_size(s->dtype));
}

static void two_gradients(setting *s, device_gradient *parts, device_array *whole) {
  parts->dy = &s->g.a;
  parts->added = &s->h.a;
  add(s, whole, &s->g.a, &s->h.a);
}

static const device_windows windows = {{.kernel = {3, 3}, .stride = {2, 2}, .padding = {1, 1}, .dilation = {1, 1}},
                                       false};

/* A pool of x; its result's gradient is made of the first elements of g. */
static void pooled_gradient(setting *s, device_gradient *parts, device_array *whole) {
  int64_t shape[] = {s->x.a.shape[0], s->x.a.shape[1], (s->x.a.shape[2] - 1) / 2 + 1, (s->x.a.shape[3] - 1) / 2 + 1};
  test_array y = test_new(s->dtype, LAYOUT_DENSE, 4, shape), where = test_new(OREPA_INT32, LAYOUT_DENSE, 4, shape);
  device_array *dy = room(s, &y), *indices = room(s, &where);
  assert_int_equal(s->context.device->max_pool_forward(&s->context, &windows, &y.a, indices, &s->x.a, NULL),
                   DEVICE_DONE);
  for (int64_t n = 0; n < test_count(dy); n++)
    test_set(dy, n, test_get(&s->g.a, n));
  parts->dy = dy;
  parts->indices = indices;
  parts->windows = &windows;
  assert_int_equal(s->context.device->max_pool_backward(&s->context, &windows, whole, dy, indices), DEVICE_DONE);
  test_release(&y);
  test_release(&where);
}

static void gradients_in_parts(void **unused) {
  (void)unused;
  for_each_table(device) for (int k = 0; k < CASES; k++) for (int half = 0; half < 2; half++) {
    orepa_dtype dtype = half ? OREPA_BFLOAT16 : OREPA_FLOAT32;
    check_masks(device, dtype, k, one_gradient);
    check_masks(device, dtype, k, two_gradients);
    if (cases[k].rank == 4)
      check_masks(device, dtype, k, pooled_gradient);
  }
}

/* ---- a pool of a map that is normalised as it is read ---- */

static void check_pool(setting *s, bool active) {
  int64_t shape[] = {s->x.a.shape[0], s->x.a.shape[1], (s->x.a.shape[2] - 1) / 2 + 1, (s->x.a.shape[3] - 1) / 2 + 1};
  test_array y = test_new(s->dtype, LAYOUT_DENSE, 4, shape), where = test_new(OREPA_INT32, LAYOUT_DENSE, 4, shape);
  device_array *z = room(s, &s->x), *found = room(s, &y), *wanted = room(s, &y);
  device_array *indices = room(s, &where), *wanted_indices = room(s, &where);
  const device_prologue prologue = {s->scale.a, s->shift.a, active};
  apply(s, z, &s->x, &s->scale, &s->shift);
  if (active)
    relu(s, z, z);
  const orepa_device *device = s->context.device;
  assert_int_equal(device->max_pool_forward(&s->context, &windows, wanted, wanted_indices, z, NULL), DEVICE_DONE);
  assert_int_equal(device->max_pool_forward(&s->context, &windows, found, indices, &s->x.a, &prologue), DEVICE_DONE);
  assert_true(test_same(found, wanted));
  assert_true(test_same(indices, wanted_indices));
  assert_int_equal(device->max_pool_forward(&s->context, &windows, found, NULL, &s->x.a, &prologue), DEVICE_DONE);
  assert_true(test_same(found, wanted));
  test_release(&y);
  test_release(&where);
}

static void a_pool_of_a_norm(void **unused) {
  (void)unused;
  for_each_table(device) for (int k = 0; k < CASES; k++) for (int half = 0; half < 2; half++) {
    if (cases[k].rank != 4)
      continue;
    setting s = setting_new(device, half ? OREPA_BFLOAT16 : OREPA_FLOAT32, k);
    check_pool(&s, false);
    check_pool(&s, true);
    test_sprinkle(&s.x, 3);
    check_pool(&s, true);
    setting_free(&s);
  }
}

int main(void) {
  const struct CMUnitTest tests[] = {
      cmocka_unit_test(a_norm_and_what_is_added_to_it),
      cmocka_unit_test(gradients_in_parts),
      cmocka_unit_test(a_pool_of_a_norm),
  };
  return cmocka_run_group_tests(tests, NULL, NULL);
}
