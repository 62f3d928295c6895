# What a project needs once before `make deploy`: APIs, the image repository, an identity for the
# containers with the least it needs, and an alert before the bill grows.
#
#   terraform init && terraform apply -var project=PROJECT -var billing_account=XXXXXX-XXXXXX-XXXXXX
#
# Not validated and not applied: the provider could not be downloaded where this was written. Its
# format was checked with `terraform fmt -check` (1.11), nothing else was.
#
# Models, endpoints and deployments are not here on purpose: `python -m deploy.vertex` makes and
# removes them. Run its `cleanup` before `terraform destroy`.

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "~> 6.0"
    }
  }
}

variable "project" {
  description = "The project's id."
  type        = string
}

variable "region" {
  description = "The same as in deploy/vertex.yaml: image and endpoint must share it."
  type        = string
  default     = "europe-west4"
}

variable "repository" {
  description = "The same as in deploy/vertex.yaml."
  type        = string
  default     = "serving"
}

variable "billing_account" {
  description = "For the budget alert. Empty makes none."
  type        = string
  default     = ""
}

variable "monthly_budget" {
  description = "In the billing account's currency. An alert stops nothing: it writes a mail."
  type        = number
  default     = 50
}

variable "weights_bucket" {
  description = "A bucket with archives for images without weights (AIP_STORAGE_URI). Empty: none."
  type        = string
  default     = ""
}

provider "google" {
  project               = var.project
  region                = var.region
  billing_project       = var.project
  user_project_override = true
}

data "google_project" "this" {}

locals {
  labels = { managed-by = "serving-llms" }
}

resource "google_project_service" "apis" {
  for_each = toset([
    "aiplatform.googleapis.com",
    "artifactregistry.googleapis.com",
    "billingbudgets.googleapis.com",
    "cloudbuild.googleapis.com",
    "iam.googleapis.com",
    "logging.googleapis.com",
  ])
  service            = each.key
  disable_on_destroy = false
}

resource "google_artifact_registry_repository" "images" {
  repository_id = var.repository
  location      = var.region
  format        = "DOCKER"
  labels        = local.labels

  # Images cost storage until they are deleted. The three newest of each stay.
  cleanup_policies {
    id     = "keep-newest"
    action = "KEEP"
    most_recent_versions {
      keep_count = 3
    }
  }
  cleanup_policies {
    id     = "delete-old"
    action = "DELETE"
    condition {
      older_than = "2592000s"
    }
  }

  depends_on = [google_project_service.apis]
}

# Vertex AI's own agent pulls the image. In the same project it may already; said here so that it
# also holds where default grants are off.
resource "google_artifact_registry_repository_iam_member" "vertex_pulls" {
  repository = google_artifact_registry_repository.images.name
  location   = var.region
  role       = "roles/artifactregistry.reader"
  member     = "serviceAccount:service-${data.google_project.this.number}@gcp-sa-aiplatform.iam.gserviceaccount.com"
}

# Who the containers are. They need to write logs and metrics, and nothing else; without it they run
# as an account of Google's that may do more.
resource "google_service_account" "server" {
  account_id   = "llm-server"
  display_name = "Model servers on Vertex AI"
  depends_on   = [google_project_service.apis]
}

resource "google_project_iam_member" "server" {
  for_each = toset(["roles/logging.logWriter", "roles/monitoring.metricWriter"])
  project  = var.project
  role     = each.key
  member   = google_service_account.server.member
}

resource "google_storage_bucket_iam_member" "server_reads_weights" {
  count  = var.weights_bucket == "" ? 0 : 1
  bucket = var.weights_bucket
  role   = "roles/storage.objectViewer"
  member = google_service_account.server.member
}

resource "google_billing_budget" "alert" {
  count           = var.billing_account == "" ? 0 : 1
  billing_account = var.billing_account
  display_name    = "serving-llms"

  budget_filter {
    projects = ["projects/${data.google_project.this.number}"]
  }
  amount {
    specified_amount {
      units = tostring(var.monthly_budget)
    }
  }
  dynamic "threshold_rules" {
    for_each = [0.1, 0.5, 1.0]
    content {
      threshold_percent = threshold_rules.value
    }
  }

  depends_on = [google_project_service.apis]
}

output "repository" {
  description = "Where images go."
  value       = "${var.region}-docker.pkg.dev/${var.project}/${var.repository}"
}

output "service_account" {
  description = "For service_account in deploy/vertex.yaml."
  value       = google_service_account.server.email
}
