/* device.c: the table of the reference device. */
#include "ref/ref.h"

const orepa_device *ref_device(void) {
#define REF_ENTRY_OF_TABLE(entry) .entry = ref_##entry,
  static const orepa_device device = {.version = DEVICE_TABLE_VERSION, .name = "ref", REF_ENTRIES(REF_ENTRY_OF_TABLE)};
#undef REF_ENTRY_OF_TABLE
  return &device;
}
