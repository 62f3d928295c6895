# What a project needs once before `make deploy`: APIs, the image repository, an account for the
# containers with few permissions, and a budget alert.
#
#   gcloud services enable cloudresourcemanager.googleapis.com serviceusage.googleapis.com
#   terraform init && terraform apply -var project=PROJECT -var billing_account=XXXXXX-XXXXXX-XXXXXX
#
# Not validated and not applied: we could not download the provider. Only `terraform fmt -check`
# (1.11) was run.
#
# Models, endpoints and deployments are not here on purpose: `python -m deploy.vertex` creates and
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
  description = "The same as in deploy/vertex/vertex.yaml: image and endpoint must share it."
  type        = string
  default     = "europe-west4"
}

variable "repository" {
  description = "The same as in deploy/vertex/vertex.yaml."
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

variable "deployers" {
  description = "Who may deploy, such as [\"user:somebody@example.com\"]."
  type        = list(string)
  default     = []
}

variable "callers" {
  description = "Who may ask, such as [\"serviceAccount:app@PROJECT.iam.gserviceaccount.com\"]."
  type        = list(string)
  default     = []
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
    "cloudresourcemanager.googleapis.com",
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

  # You pay for the storage of images until they are deleted. The three newest of each stay.
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

# Vertex AI's own agent pulls the image, and has the permission in the same project. It is created at
# the first use of the service, so granting it a role here would fail in a new project.

# The containers' account, which can only write logs. Without it they run as an account of Google's
# that can read the model's artifacts.
resource "google_service_account" "server" {
  account_id   = "llm-server"
  display_name = "Model servers on Vertex AI"
  depends_on   = [google_project_service.apis]
}

resource "google_project_iam_member" "server" {
  for_each = toset(["roles/logging.logWriter"])
  project  = var.project
  role     = each.key
  member   = google_service_account.server.member
}

# The deployer's roles: models and endpoints, images, the containers' account, logs.
resource "google_project_iam_member" "deployers" {
  for_each = {
    for pair in setproduct(var.deployers, ["roles/aiplatform.user", "roles/logging.viewer"]) :
    join(" ", pair) => pair
  }
  project = var.project
  role    = each.value[1]
  member  = each.value[0]
}

resource "google_artifact_registry_repository_iam_member" "deployers" {
  for_each   = toset(var.deployers)
  repository = google_artifact_registry_repository.images.name
  location   = var.region
  role       = "roles/artifactregistry.writer"
  member     = each.key
}

resource "google_service_account_iam_member" "deployers" {
  for_each           = toset(var.deployers)
  service_account_id = google_service_account.server.name
  role               = "roles/iam.serviceAccountUser"
  member             = each.key
}

# The clients' role: predictions only.
resource "google_project_iam_custom_role" "caller" {
  role_id     = "llmCaller"
  title       = "Send requests to models on Vertex AI"
  permissions = ["aiplatform.endpoints.predict"]
  depends_on  = [google_project_service.apis]
}

resource "google_project_iam_member" "callers" {
  for_each = toset(var.callers)
  project  = var.project
  role     = google_project_iam_custom_role.caller.id
  member   = each.key
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
  description = "For service_account in deploy/vertex/vertex.yaml."
  value       = google_service_account.server.email
}
