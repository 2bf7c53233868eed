/* device.c: the devices by name, and what a kernel's status means to the caller. */
#include "device.h"

#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <zlib.h>

#include "cpu/features.h"
#include "cpu/onednn.h"
#include "error.h"

const orepa_device *orepa_device_by_name(const char *name) {
  if (!strcmp(name, "cpu"))
    return cpu_device();
  if (!strcmp(name, "ref"))
    return ref_device();
  error_set("no device is called '%s' (there are cpu and ref)", name);
  return NULL;
}

const char *orepa_device_name(const orepa_device *device) {
  return device->name;
}

int device_check(device_status status, const orepa_device *device, const char *op, orepa_dtype dtype) {
  if (status == DEVICE_DONE)
    return 0;
  if (status == DEVICE_UNSUPPORTED)
    return error_set("%s: the device '%s' does not do this for %s", op, device->name, orepa_dtype_name(dtype));
  return error_prefix("%s: ", op);
}

const char *orepa_build_info(void) {
  static _Thread_local char text[512];
  snprintf(text, sizeof text, "oneDNN %s, zlib %s, jansson %s, OpenMP, %d threads\n%s", onednn_version(), zlibVersion(),
           JANSSON_VERSION, orepa_threads(), cpu_features_text());
  return text;
}
